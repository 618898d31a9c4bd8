"""Plans the next step: decodes first, then prompts in pieces, then new requests while they fit."""

from __future__ import annotations

import math
from collections.abc import Callable

from ellm_jax.memory.host_tier import HostTier
from ellm_jax.memory.ledger import Ledger
from ellm_jax.request import Request, Status
from ellm_jax.scheduler.cost import CostModel
from ellm_jax.scheduler.demand import Demand
from ellm_jax.scheduler.pace import Pace
from ellm_jax.scheduler.plan import Draft, NeedBytes, Plan, Share
from ellm_jax.scheduler.policy import Rules
from ellm_jax.scheduler.queues import Queues
from ellm_jax.scheduler.sharing import PrefixSharing
from ellm_jax.scheduler.slo import SloBuffer
from ellm_jax.scheduler.tiers import TierChoices

_LOOKED_AT = 32
"""Most waiting requests looked at in a step, where those before them wait for somebody's prefix."""
_KEEP_UP = 0.9
"""Share of the TPOT target that a step may take when requests are behind it: so they catch up."""


class Scheduler(Queues):
    """The queues of requests, and what of them runs next.

    Plain bookkeeping: it takes slots and counts chunks, the caller reserves and dispatches. A
    request is admitted when its prompt fits beside what those that run are known to need; or, with
    a host tier and a TTFT target, when it fits for as long as its prefill takes, to leave for host
    memory after its first token (eLLM section 4.3). Of the requests of a failed step at most one is
    in each later step, until a step with it succeeds: so that the one to blame is found, and its
    mates are not dragged along.

    Attributes:
        rules: of the policy.
        cost: how long steps and copies take.
        sharing: prefixes that requests share.
        pace: when their tokens are due.
        tiers: who goes to host memory, and who comes back.
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
        super().__init__(state_rows)
        self._ledger = ledger
        self._need_bytes = need_bytes
        self._rows_below = rows_below
        self.rules = rules
        self.cost = cost
        self._max_num_seqs = max_num_seqs
        self._smallest_prefill = smallest_prefill
        self.sharing = PrefixSharing(ledger)
        self.pace = Pace()
        self._demand = Demand(ledger, need_bytes, smallest_prefill)
        self.tiers = TierChoices(
            self, ledger, self._demand, self.pace, cost, max_num_seqs, host, slo
        )

    def could_run(self, request: Request) -> bool:
        """Whether a request would fit if it were alone; one that was taken in may not after the
        limit was lowered, and waits until it is raised."""
        return self._demand.could_run(request)

    def trim_running(self) -> bool:
        """Unmaps what slots hold beyond their request's tokens; True if anything was. No step may
        be in flight."""
        return self._ledger.trim_slots(
            {r.slot: r.num_tokens for r in self.running if r.slot is not None}
        )

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
        draft.add_decodes(self.running)
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
                slack_s = self.pace.due_s(request) - now
                allowed_s = min(allowed_s, max(_KEEP_UP * 1e-3 * request.tpot_ms, slack_s / 2))
        if allowed_s < math.inf:
            draft.budget_s = allowed_s
        elif self.rules.rows_beside_decodes is not None:
            draft.max_rows = max(
                len(draft.shares) + 1, min(draft.max_rows, self.rules.rows_beside_decodes)
            )

    def _add_prefills(self, draft: Draft) -> None:
        if len(draft.shares) == len(self.running):
            return  # all of them decode
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

    def _take_in(self, request: Request, found: int, draft: Draft) -> bool:
        if not self.has_state_row(request):
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
        if request.ttft_ms is None or not self.tiers.may_offload(request):
            return False  # who has no target is in no hurry
        chunks = self._chunks_to_take(request, found)
        unfinished = self._demand.unfinished_chunks(self.running)
        return self._has_room(draft, max(draft.chunks, unfinished) + chunks, request)

    def _chunks_to_take(self, request: Request, found: int) -> int:
        # Tiles found that nobody uses are part of the room, and no longer once they are taken.
        total = self._ledger.chunks_for(request.num_tokens + 1)
        return total - self.sharing.in_use(request, found)

    def _promised(self, draft: Draft) -> int:
        """Chunks that those that run are known to need: what is left of their prompts, or this
        step's, and one more for each that will grow."""
        unfinished = self._demand.unfinished_chunks(self.running)
        return max(draft.chunks, unfinished) + self._demand.next_chunks(self.running)

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
