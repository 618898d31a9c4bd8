"""Plans the next step: decodes first, then prompts in pieces, then new requests while they fit."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable

from ellm_jax.memory.host_tier import HostTier
from ellm_jax.memory.ledger import Ledger
from ellm_jax.request import Request, Status
from ellm_jax.runtime.shapes import StepMode
from ellm_jax.scheduler.cost import CostModel
from ellm_jax.scheduler.plan import Draft, NeedBytes, Plan, Share
from ellm_jax.scheduler.policy import Rules
from ellm_jax.scheduler.sharing import PrefixSharing
from ellm_jax.scheduler.slo import SloBuffer

_LOOKED_AT = 32
"""Most waiting requests looked at in a step, where those before them wait for somebody's prefix."""
_KEEP_UP = 0.9
"""Share of the TPOT target that a step may take when requests are behind it: so they catch up."""
_PACE_GAIN = 0.1
"""How much the latest step, or the latest answer, counts in the running means."""
_PACE_MARGIN = 1.5
"""How much slower than now tokens may come before a request is late."""
_PATIENCE = 0.02
"""Share of its TTFT target that a prompt waits before others make way for it."""
_MOST_PREEMPTIONS = 4
"""After so many, a request gives its memory up only if nobody else can."""


class Scheduler:
    """Requests in order: `running` by admission, oldest first; `waiting` and `offloaded` by rank.

    Plain bookkeeping: it takes slots and counts chunks, the caller reserves and dispatches. A
    request is admitted when its prompt fits beside what those that run are known to need; or, with
    a host tier and a TTFT target, when it fits for as long as its prefill takes, to leave for host
    memory after its first token (eLLM section 4.3). Of the requests of a failed step at most one is
    in each later step, until a step with it succeeds: so that the one to blame is found, and its
    mates are not dragged along.
    """

    def __init__(
        self,
        ledger: Ledger,
        need_bytes: NeedBytes,
        rows_below: Callable[[int], int | None],
        rules: Rules,
        cost: CostModel,
        *,
        max_num_seqs: int,
        state_rows: int,
        smallest_prefill: int = 1,
        host: HostTier | None = None,
        slo: SloBuffer | None = None,
    ):
        """Args:
        ledger: the memory.
        need_bytes: what a step takes.
        rows_below: the next smaller number of rows worth trying when a need does not fit.
        rules: of the policy.
        cost: how long steps and copies take.
        max_num_seqs: most requests that run.
        state_rows: most requests with penalties, bias or min_tokens that run.
        smallest_prefill: rows of the smallest piece of a prompt worth computing.
        host: the host tier, where there is one.
        slo: how much of it prompts may take.
        """
        self._ledger = ledger
        self._need_bytes = need_bytes
        self._rows_below = rows_below
        self.rules = rules
        self.cost = cost
        self._max_num_seqs = max_num_seqs
        self._state_rows = state_rows
        self._smallest_prefill = smallest_prefill
        self._host = host
        self._slo = slo
        self.sharing = PrefixSharing(ledger)
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.offloaded: list[Request] = []
        self.moving: list[Request] = []
        self._numbers = itertools.count()
        self._smallest_need: int | None = None
        self._pace_s = 0.0
        self._used_share = 1.0

    # The queues.

    @property
    def busy(self) -> bool:
        """Whether a request is anywhere."""
        return bool(self.running or self.waiting or self.offloaded or self.moving)

    def add(self, request: Request) -> None:
        """Queues a request by its rank."""
        if request.number < 0:
            request.number = next(self._numbers)
        bisect.insort(self.waiting, request, key=lambda r: r.rank)

    def remove(self, request: Request) -> None:
        """Takes a request out of its queue; its slot is the caller's to release."""
        queue = self._queue_of(request)
        if request in queue:
            queue.remove(request)

    def _queue_of(self, request: Request) -> list[Request]:
        if request.status is Status.RUNNING:
            return self.running
        if request.status is Status.WAITING:
            return self.waiting
        return self.offloaded if request.status is Status.OFFLOADED else self.moving

    def move(self, request: Request, status: Status) -> None:
        """Puts a request into another queue."""
        self.remove(request)
        request.status = status
        if status is Status.WAITING:
            self.add(request)
        elif status is Status.OFFLOADED:
            bisect.insort(self.offloaded, request, key=lambda r: r.rank)
        elif status is not Status.FINISHED:
            self._queue_of(request).append(request)

    def requeue(self, request: Request) -> None:
        """Puts a request that lost its slot, and has nothing in host memory, back to wait."""
        self.remove(request)
        request.restart()
        self.add(request)

    def due_s(self, request: Request) -> float:
        """Until when a request may rest and still keep its TPOT target, a mean over its answer, if
        its tokens then come at the present pace; its rank where it has no target. How long the
        answer will be is judged by how much of `max_tokens` others have lately used."""
        if request.tpot_ms is None or request.first_token_s is None:
            return request.rank[0]
        tokens = max(len(request.output_ids) + 1, round(self._used_share * request.max_tokens))
        left = tokens - len(request.output_ids)
        end_s = request.first_token_s + 1e-3 * request.tpot_ms * (tokens - 1)
        return end_s - _PACE_MARGIN * self._pace_s * left

    def note_pace(self, seconds: float) -> None:
        """A step in which requests decoded took so long."""
        self._pace_s += _PACE_GAIN * (seconds - self._pace_s)

    def note_length(self, request: Request) -> None:
        """A request came to its end by itself."""
        share = len(request.output_ids) / request.max_tokens
        self._used_share += _PACE_GAIN * (share - self._used_share)

    # Planning.

    def plan(self, now: float, *, admit: bool = True, exact: bool = False) -> Plan | None:
        """The next step, or None when nothing can be computed right now.

        New requests that are part of it have a slot and are in `running` when this returns; no
        memory is mapped yet but for shared prefixes. `exact` counts with the smallest bucket for
        every step, compiling it where need be.

        Raises:
            MemoryPressure: not even the decodes, or the smallest piece of the oldest prompt, fit;
                with the figures.
        """
        rules, ledger = self.rules, self._ledger
        draft = Draft(
            ledger,
            self._need_bytes,
            self._rows_below,
            self.cost,
            ledger.room_bytes,
            max(rules.max_rows, self._max_num_seqs),
            floor_bytes=ledger.floor_bytes,
            whole=rules.whole_prompts,
            exact=exact,
            least_rows=self._smallest_prefill,
        )
        if not rules.prompts_first:
            self._add_decodes(draft)
            self._limit(draft, now)
        self._add_prefills(draft)
        if admit:
            self._admit(draft)
        if rules.prompts_first and not draft.shares:
            self._add_decodes(draft)
        return draft.plan()

    def _add_decodes(self, draft: Draft) -> None:
        for request in self.running:
            if request.remaining == 1 and not request.parked and draft.open_to(request):
                draft.add(Share(request, request.computed, 1, True))
        if draft.shares and not draft.fits_now:
            raise draft.pressure()

    def _limit(self, draft: Draft, now: float) -> None:
        """How large the step may be beside its decodes (design: elastic prefill)."""
        if not draft.shares:
            return
        allowed_s = math.inf
        for share in draft.shares:
            request = share.request
            if request.tpot_ms is not None:
                slack_s = self.due_s(request) - now
                allowed_s = min(allowed_s, max(_KEEP_UP * 1e-3 * request.tpot_ms, slack_s / 2))
        if allowed_s < math.inf:
            draft.budget_s = allowed_s
        elif self.rules.rows_beside_decodes is not None:
            draft.max_rows = max(
                len(draft.shares) + 1, min(draft.max_rows, self.rules.rows_beside_decodes)
            )

    def _add_prefills(self, draft: Draft) -> None:
        for request in self.running:
            if request.remaining > 1 and not request.parked and draft.open_to(request):
                prefill = draft.largest_share(request)
                if prefill is None:
                    if not draft.shares and not self.rules.whole_prompts:
                        raise draft.pressure(Share(request, request.computed, 1, False))
                    if not draft.shares:
                        raise draft.pressure(
                            Share(request, request.computed, request.remaining, True)
                        )
                    break
                draft.add(prefill)

    # Admission.

    def _admit(self, draft: Draft) -> None:
        index = looked_at = 0
        while index < len(self.waiting) and len(self.running) < self._max_num_seqs:
            request = self.waiting[index]
            if not self.could_run(request):
                index += 1
                continue
            found = self.sharing.found(request)
            if self.sharing.comes_soon(request, found):
                index += 1
                looked_at += 1
                if looked_at == _LOOKED_AT:
                    return
                continue
            # Nobody overtakes: who comes later would only take what this one waits for.
            if not draft.open_to(request) or not self._take_in(request, found, draft):
                return

    def _has_state_row(self, request: Request) -> bool:
        """Whether a request that needs a row of sampler state would get one."""
        if not request.params.needs_state:
            return True
        taken = sum(r.params.needs_state for r in (*self.running, *self.moving))
        return taken < self._state_rows

    def _take_in(self, request: Request, found: int, draft: Draft) -> bool:
        if not self._has_state_row(request):
            return False
        if self.rules.whole_prompts:
            left = request.num_tokens - found * self._ledger.tile_tokens
            if draft.rows + left > draft.max_rows:
                return False
        stays = self._fits_beside(request, found, draft)
        if not stays and not self._fits_for_a_while(request, found, draft):
            return False
        before = self._ledger.room_bytes
        if not self.sharing.open_slot(request, found):
            return False
        slot = request.slot
        assert slot is not None
        self.waiting.remove(request)
        request.status = Status.RUNNING
        self.running.append(request)
        request.to_host = not stays
        if request.first_scheduled_s is None:
            request.cached_tokens = request.computed
        if request.synthetic:
            request.computed = max(request.computed, len(request.prompt_ids) - 1)
        # What is mapped in its slot was free, or a prefix nobody used, and is its own now.
        draft.room_bytes -= before - self._ledger.room_bytes
        share = draft.largest_share(request)
        if share is not None:
            draft.add(share)
        return share is not None

    def _fits_beside(self, request: Request, found: int, draft: Draft) -> bool:
        """Whether the whole prompt fits, beside this step's chunks, what is left of the prompts
        that run, and one more chunk for each that runs: else it would only take memory that
        they need next, and be preempted for it."""
        if not self.running and not self.moving and not self.offloaded:
            return True  # alone: the engine checked that it fits
        if any(self.could_run(r) for r in self.offloaded):
            return False  # those come first
        chunks = self._chunks_to_take(request, found)
        return self._has_room(draft, draft.chunks + chunks, request) and self._has_room(
            draft, self._promised(draft) + chunks, request
        )

    def _fits_for_a_while(self, request: Request, found: int, draft: Draft) -> bool:
        """Whether the prompt fits until its first token, and host memory has room for it then."""
        if request.ttft_ms is None or not self.may_offload(request):
            return False  # who has no target is in no hurry
        chunks = self._chunks_to_take(request, found)
        unfinished = sum(self._missing(r) for r in self.running if r.remaining > 1)
        return self._has_room(draft, max(draft.chunks, unfinished) + chunks, request)

    def _chunks_to_take(self, request: Request, found: int) -> int:
        # Tiles found that nobody uses are part of the room, and no longer once they are taken.
        total = self._ledger.chunks_for(request.num_tokens + 1)
        return total - self.sharing.in_use(request, found)

    def _promised(self, draft: Draft) -> int:
        """Chunks that those that run are known to need: what is left of their prompts, or this
        step's, and one more for each that will grow."""
        ledger = self._ledger
        unfinished = sum(self._missing(r) for r in self.running if r.remaining > 1)
        headroom = sum(
            ledger.chunks_for(r.max_total_tokens) > ledger.chunks_for(r.num_tokens)
            for r in self.running
        )
        return max(draft.chunks, unfinished) + headroom

    def _missing(self, request: Request) -> int:
        assert request.slot is not None
        return self._ledger.missing_chunks(request.slot, request.num_tokens)

    def _has_room(self, draft: Draft, chunks: int, request: Request) -> bool:
        """Whether so many chunks fit beside a step with at least a piece of the request."""
        left = draft.room_bytes - chunks * self._ledger.chunk_bytes
        if left < 0:
            return False
        rows = min(draft.max_rows, draft.rows + max(1, request.remaining))
        while draft.need(rows, len(draft.shares) + 1, draft.mode) > left:
            below = self._rows_below(rows)
            if self.rules.whole_prompts or below is None or below <= draft.rows:
                return False
            rows = below
        return True

    # Limits and the host tier.

    def could_run(self, request: Request) -> bool:
        """Whether a request would fit if it were alone; one that was taken in may not after the
        limit was lowered, and waits until it is raised."""
        ledger = self._ledger
        total = max(request.max_total_tokens, request.num_tokens + 1)
        if self._smallest_need is None:
            self._smallest_need = self._need_bytes(self._smallest_prefill, 1, StepMode(), True)
        need = max(ledger.floor_bytes, self._smallest_need)
        kv_bytes = ledger.chunks_for(total) * ledger.chunk_bytes
        return kv_bytes + need <= ledger.capacity_bytes

    def may_offload(self, request: Request) -> bool:
        """Whether the logical size of the host tier has room for a prompt."""
        if self._host is None or self._slo is None:
            return False
        blocks = self._host.blocks_for(request.num_tokens + 1)
        coming = sum(
            self._host.blocks_for(r.num_tokens + 1) for r in self.running if r.to_host or r.parked
        )
        wanted = self._host.needed_bytes + (coming + blocks) * self._host.block_bytes
        return wanted <= self._slo.limit_bytes

    def wants_prompts(self, now: float) -> bool:
        """Whether memory that comes free should go to a waiting prompt rather than to a request in
        host memory: while the host tier has room for it, and no token there is due."""
        head = self.head()
        if head is None or head.ttft_ms is None or not self.may_offload(head):
            return False
        return not self._is_due(now, self.cost.prefill_s(0, head.num_tokens))

    def first_due(self) -> Request | None:
        """Who in host memory has to come back first to keep its TPOT target."""
        able = (r for r in self.offloaded if r.tpot_ms is not None and self.could_run(r))
        return min(able, key=self.back_by_s, default=None)

    def back_by_s(self, request: Request) -> float:
        """Until when a request may stay in host memory: it may not rest for longer than a prompt
        is promised to wait at most, however long it could."""
        if request.ttft_ms is None:
            return self.due_s(request)
        return min(self.due_s(request), request.left_s + 1e-3 * request.ttft_ms)

    def _is_due(self, now: float, ahead_s: float = 0.0) -> bool:
        """Whether somebody in host memory has to come back now, or in so many seconds."""
        first = self.first_due()
        return first is not None and self.back_by_s(first) - now <= self.copy_s(first) + ahead_s

    def head(self) -> Request | None:
        """The first that waits and could run."""
        return next((r for r in self.waiting if self.could_run(r)), None)

    def copy_s(self, request: Request) -> float:
        """Seconds to copy a request's KV one way."""
        chunks = self._ledger.chunks_for(request.num_tokens)
        return chunks * self._ledger.chunk_bytes / self.cost.copy_bytes_per_s

    def next_fetch(self, now: float) -> Request | None:
        """The request to bring back from host memory now, if one fits beside those that run and
        leaves room for the prompt that is to go before it. Who has to be back first goes first."""
        for request in sorted(self.offloaded, key=lambda r: (self.back_by_s(r), r.rank)):
            if not self.could_run(request) or not self._has_state_row(request):
                continue
            if len(self.running) + len(self.moving) >= self._max_num_seqs:
                return None
            ledger = self._ledger
            chunks = ledger.chunks_for(request.num_tokens + 1)
            if self.running or self.moving:
                chunks += sum(self._missing(r) for r in self.running if r.remaining > 1)
                chunks += sum(
                    ledger.chunks_for(r.max_total_tokens) > ledger.chunks_for(r.num_tokens)
                    for r in (*self.running, request)
                )
                head = self.head() if self.wants_prompts(now) else None
                if head is not None:
                    chunks += ledger.chunks_for(head.num_tokens + 1)
            rows = len(self.running) + 1
            need = max(ledger.floor_bytes, self._need_bytes(rows, rows, StepMode(), False))
            fits = chunks * ledger.chunk_bytes + need <= ledger.room_bytes
            return request if fits else None
        return None

    def may_make_way(self, now: float) -> Request | None:
        """Who should leave for host memory so that a waiting prompt meets its TTFT target: the
        request whose next token is due last, if its slack covers the copies and the prefill."""
        if self._host is None or not self.waiting:
            return None
        head = self.head()
        if head is None or head.ttft_ms is None:
            return None
        if now - head.arrival_s < _PATIENCE * 1e-3 * head.ttft_ms or not self.may_offload(head):
            return None
        if any(r.parked or r.to_host for r in self.running) or self.moving:
            return None
        prefill_s = self.cost.prefill_s(0, head.num_tokens)

        def slack_s(request: Request) -> float:
            if request.tpot_ms is None:
                return math.inf
            return self.due_s(request) - now - prefill_s - 2 * self.copy_s(request)

        able = [
            r
            for r in self.running
            if r.output_ids
            and not r.copy_failed
            and r.num_offloads < _MOST_PREEMPTIONS
            and self._host.room_for(r.num_tokens + head.num_tokens)
            and slack_s(r) > 0
        ]
        return max(able, key=lambda r: (slack_s(r), r.rank), default=None)

    # Pressure.

    def trim_running(self) -> bool:
        """Unmaps what slots hold beyond their request's tokens; True if anything was. No step may
        be in flight."""
        return self._ledger.trim_slots(
            {r.slot: r.num_tokens for r in self.running if r.slot is not None}
        )

    def victim(self) -> Request | None:
        """Who makes room under pressure: the last in rank, of those that have not done so often;
        nobody where only one runs."""
        if len(self.running) < 2:
            return None
        return max(
            self.running,
            key=lambda r: (r.num_preemptions + r.num_offloads < _MOST_PREEMPTIONS, r.rank),
        )

    def prefers_offload(self, victim: Request) -> bool:
        """Whether copying a request's KV out and back is quicker than computing it again, and host
        memory has room for it."""
        if self._host is None or victim.computed < 1 or victim.copy_failed:
            return False
        again_s = self.cost.prefill_s(0, victim.num_tokens)
        return self._host.room_for(victim.num_tokens) and 2 * self.copy_s(victim) < again_s
