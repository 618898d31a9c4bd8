"""The choices between the tiers: who gives memory up, who goes to host memory, and who comes back.

Choices only: `tiering.py` and the host loop carry them out.
"""

from __future__ import annotations

import math

from ellm_jax.memory.host_tier import HostTier
from ellm_jax.memory.ledger import Ledger
from ellm_jax.request import Request
from ellm_jax.scheduler.cost import CostModel
from ellm_jax.scheduler.demand import Demand
from ellm_jax.scheduler.pace import Pace
from ellm_jax.scheduler.queues import Queues
from ellm_jax.scheduler.slo import SloBuffer

_PATIENCE = 0.02
"""Share of its TTFT target that a prompt waits before others make way for it."""
_MOST_PREEMPTIONS = 4
"""After so many, a request gives its memory up only if nobody else can."""


class TierChoices:
    """Who should be where, by what was promised about latency. Changes nothing."""

    def __init__(
        self,
        queues: Queues,
        ledger: Ledger,
        demand: Demand,
        pace: Pace,
        cost: CostModel,
        max_num_seqs: int,
        host: HostTier | None,
        slo: SloBuffer | None,
    ):
        """Args:
        queues: where requests are.
        ledger: device memory.
        demand: what requests take of it.
        pace: when their tokens are due.
        cost: how long steps and copies take.
        max_num_seqs: most requests that run.
        host: the host tier, where there is one.
        slo: how much of it prompts may take.
        """
        self._queues = queues
        self._ledger = ledger
        self._demand = demand
        self._pace = pace
        self._cost = cost
        self._max_num_seqs = max_num_seqs
        self._host = host
        self._slo = slo

    # Prompts that wait.

    def head(self) -> Request | None:
        """The first that waits and could run."""
        return next((r for r in self._queues.waiting if self._demand.could_run(r)), None)

    def may_offload(self, request: Request) -> bool:
        """Whether the logical size of the host tier has room for a prompt."""
        if self._host is None or self._slo is None:
            return False
        blocks = self._host.blocks_for(request.num_tokens + 1)
        running = self._queues.running
        coming = sum(
            self._host.blocks_for(r.num_tokens + 1) for r in running if r.to_host or r.parked
        )
        wanted = self._host.needed_bytes + (coming + blocks) * self._host.block_bytes
        return wanted <= self._slo.limit_bytes

    def may_make_way(self, now: float) -> Request | None:
        """Who should leave for host memory so that a waiting prompt meets its TTFT target: the
        request whose next token is due last, if its slack covers the copies and the prefill."""
        queues, host = self._queues, self._host
        if host is None or not queues.waiting:
            return None
        head = self.head()
        if head is None or head.ttft_ms is None:
            return None
        if now - head.arrival_s < _PATIENCE * 1e-3 * head.ttft_ms or not self.may_offload(head):
            return None
        if any(r.parked or r.to_host for r in queues.running) or queues.moving:
            return None
        prefill_s = self._cost.prefill_s(0, head.num_tokens)

        def slack_s(request: Request) -> float:
            if request.tpot_ms is None:
                return math.inf
            return self._pace.due_s(request) - now - prefill_s - 2 * self._copy_s(request)

        able = [
            r
            for r in queues.running
            if r.output_ids
            and not r.copy_failed
            and r.num_offloads < _MOST_PREEMPTIONS
            and host.room_for(r.num_tokens + head.num_tokens)
            and slack_s(r) > 0
        ]
        return max(able, key=lambda r: (slack_s(r), r.rank), default=None)

    # Requests in host memory.

    def next_fetch(self, now: float) -> Request | None:
        """The request to bring back from host memory now, if one fits beside those that run and
        leaves room for the prompt that is to go before it. Who has to be back first goes first."""
        queues, ledger, demand = self._queues, self._ledger, self._demand
        for request in sorted(queues.offloaded, key=lambda r: (self._pace.back_by_s(r), r.rank)):
            if not demand.could_run(request) or not queues.has_state_row(request):
                continue
            if len(queues.running) + len(queues.moving) >= self._max_num_seqs:
                return None
            chunks = ledger.chunks_for(request.num_tokens + 1)
            if queues.running or queues.moving:
                chunks += demand.unfinished_chunks(queues.running)
                chunks += demand.next_chunks((*queues.running, request))
                head = self.head() if self._wants_prompts(now) else None
                if head is not None:
                    chunks += ledger.chunks_for(head.num_tokens + 1)
            need = demand.decoding_bytes(len(queues.running) + 1)
            fits = chunks * ledger.chunk_bytes + need <= ledger.room_bytes
            return request if fits else None
        return None

    def _wants_prompts(self, now: float) -> bool:
        """Whether memory that comes free should go to a waiting prompt rather than to a request in
        host memory: while the host tier has room for it, and no token there is due."""
        head = self.head()
        if head is None or head.ttft_ms is None or not self.may_offload(head):
            return False
        return not self._is_due(now, self._cost.prefill_s(0, head.num_tokens))

    def _is_due(self, now: float, ahead_s: float) -> bool:
        """Whether somebody in host memory has to come back in so many seconds."""
        first = self._first_due()
        if first is None:
            return False
        return self._pace.back_by_s(first) - now <= self._copy_s(first) + ahead_s

    def _first_due(self) -> Request | None:
        """Who in host memory has to come back first to keep its TPOT target."""
        offloaded = self._queues.offloaded
        able = (r for r in offloaded if r.tpot_ms is not None and self._demand.could_run(r))
        return min(able, key=self._pace.back_by_s, default=None)

    def _copy_s(self, request: Request) -> float:
        """Seconds to copy a request's KV one way."""
        chunks = self._ledger.chunks_for(request.num_tokens)
        return self._cost.copy_s(chunks * self._ledger.chunk_bytes)

    def late(self, now: float) -> tuple[bool, bool]:
        """Whether a prompt waits past its TTFT target, and whether a request is kept in host memory
        past the time that its TPOT target leaves it."""
        head = self.head()
        overdue = (
            head is not None
            and head.ttft_ms is not None
            and head.first_token_s is None
            and 1e3 * (now - head.arrival_s) > head.ttft_ms
        )
        # One that left for lack of memory before its first token is not late by TPOT.
        kept = any(
            request.tpot_ms is not None
            and request.first_token_s is not None
            and self._pace.due_s(request) < now
            and self._demand.could_run(request)
            for request in self._queues.offloaded
        )
        return overdue, kept

    # Pressure.

    def victim(self) -> Request | None:
        """Who makes room under pressure: the last in rank, of those that have not done so often;
        nobody where only one runs."""
        if len(self._queues.running) < 2:
            return None
        return max(
            self._queues.running,
            key=lambda r: (r.num_preemptions + r.num_offloads < _MOST_PREEMPTIONS, r.rank),
        )

    def prefers_offload(self, victim: Request) -> bool:
        """Whether copying a request's KV out and back is quicker than computing it again, and host
        memory has room for it."""
        if self._host is None or victim.computed < 1 or victim.copy_failed:
            return False
        again_s = self._cost.prefill_s(0, victim.num_tokens)
        return self._host.room_for(victim.num_tokens) and 2 * self._copy_s(victim) < again_s
