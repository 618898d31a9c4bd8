"""Plans the next step: decodes first, then prompts in chunks, then new requests while they fit."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ellm_jax._native import OutOfMemory
from ellm_jax.config import format_bytes
from ellm_jax.memory.ledger import Ledger
from ellm_jax.request import Request, Status
from ellm_jax.runtime.shapes import StepMode

NeedBytes = Callable[[int, int, StepMode, bool], int]
"""(token rows, sequences, mode, exact) -> what such a step takes beyond its arguments. With `exact`
of the smallest bucket, even if that has to be compiled first."""


@dataclass(frozen=True)
class Share:
    """What a request gets of a step.

    Attributes:
        request: who.
        begin: first token to compute.
        count: how many.
        samples: whether the last of them yields a new token.
    """

    request: Request
    begin: int
    count: int
    samples: bool

    @property
    def mode(self) -> StepMode:
        """What the step has to report for it."""
        params = self.request.params
        rest_of_prompt = self.begin + 1 < len(self.request.prompt_ids)
        return StepMode(
            logprobs=self.samples and params.logprobs is not None,
            prompt_logprobs=rest_of_prompt and self.request.wants_prompt_logprobs,
        )


@dataclass(frozen=True)
class Plan:
    """A step to run.

    Attributes:
        shares: one per request, at least one.
        mode: what the step reports.
        rows: tokens of all shares.
    """

    shares: tuple[Share, ...]
    mode: StepMode
    rows: int


class MemoryPressure(Exception):
    """The requests that run cannot all go on with the memory there is: one has to make room."""


@dataclass
class _Draft:
    """A plan in the making: what it holds so far, and what may still be added."""

    ledger: Ledger
    need_bytes: NeedBytes
    rows_below: Callable[[int], int | None]
    free_bytes: int
    max_rows: int
    exact: bool
    shares: list[Share] = field(default_factory=list)
    mode: StepMode = field(default_factory=StepMode)
    rows: int = 0
    chunks: int = 0
    suspect: bool = False

    def fits(self, share: Share) -> bool:
        """Whether the step with this share too fits the memory."""
        need = self.need_bytes(
            self.rows + share.count, len(self.shares) + 1, self.mode | share.mode, self.exact
        )
        taken = (self.chunks + self._missing(share)) * self.ledger.chunk_bytes
        return taken + need <= self.free_bytes

    def add(self, share: Share) -> None:
        """Takes a share in."""
        self.chunks += self._missing(share)
        self.rows += share.count
        self.mode |= share.mode
        self.suspect |= share.request.suspect
        self.shares.append(share)

    def largest_share(self, request: Request) -> Share | None:
        """The largest piece of what a request has to compute that still fits; None if none does."""
        count = min(request.remaining, self.max_rows - self.rows)
        while count > 0:
            share = Share(request, request.computed, count, samples=count == request.remaining)
            if self.fits(share):
                return share
            smaller = self.rows_below(self.rows + count)
            count = 0 if smaller is None else smaller - self.rows
        return None

    def open_to(self, request: Request) -> bool:
        """Whether there is room for a row, and no second suspect of a failed step comes in."""
        return self.rows < self.max_rows and not (self.suspect and request.suspect)

    def _missing(self, share: Share) -> int:
        assert share.request.slot is not None
        return self.ledger.missing_chunks(share.request.slot, share.begin + share.count)


class Scheduler:
    """Requests in order: `running` by admission, oldest first, and `waiting` by arrival.

    Plain bookkeeping: it takes slots and counts chunks, the caller reserves and dispatches. A
    request is admitted when its prompt fits beside what those that run are known to need. Of the
    requests of a failed step at most one is in each later step, until a step with it succeeds: so
    that the one to blame is found, and its mates are not dragged along.
    """

    def __init__(
        self,
        ledger: Ledger,
        need_bytes: NeedBytes,
        rows_below: Callable[[int], int | None],
        max_num_seqs: int,
        max_batch_tokens: int,
        state_rows: int,
    ):
        """Args:
        ledger: the memory.
        need_bytes: what a step takes.
        rows_below: the next smaller number of rows worth trying when a need does not fit.
        max_num_seqs: most requests that run.
        max_batch_tokens: most tokens of a step.
        state_rows: most requests with penalties, bias or min_tokens that run.
        """
        self._ledger = ledger
        self._need_bytes = need_bytes
        self._rows_below = rows_below
        self._max_num_seqs = max_num_seqs
        self._max_batch_tokens = max_batch_tokens
        self._state_rows = state_rows
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()

    def add(self, request: Request) -> None:
        """Queues a request behind those that wait."""
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Takes a request out of its queue; its slot is the caller's to release."""
        if request.status is Status.RUNNING:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def plan(self, *, admit: bool = True, exact: bool = False) -> Plan | None:
        """The next step, or None when nothing can be computed right now.

        New requests that are part of it have a slot and are in `running` when this returns; no
        memory is mapped yet. `exact` counts with the smallest bucket for every step, compiling it
        where need be.

        Raises:
            MemoryPressure: not even the decodes, or the smallest piece of the oldest prompt, fit;
                with the figures.
        """
        draft = _Draft(
            self._ledger,
            self._need_bytes,
            self._rows_below,
            self._ledger.free_bytes,
            self._max_batch_tokens,
            exact,
        )
        for request in self.running:
            if request.remaining == 1 and draft.open_to(request):
                share = Share(request, request.computed, 1, samples=True)
                if not draft.fits(share):
                    raise self._pressure(share, draft)
                draft.add(share)
        for request in self.running:
            if request.remaining > 1 and draft.open_to(request):
                prefill = draft.largest_share(request)
                if prefill is None:
                    if not draft.shares:
                        one = Share(request, request.computed, 1, samples=False)
                        raise self._pressure(one, draft)
                    break
                draft.add(prefill)
        if admit:
            self._admit_while_it_fits(draft)
        if not draft.shares:
            return None
        return Plan(tuple(draft.shares), draft.mode, draft.rows)

    def _admit_while_it_fits(self, draft: _Draft) -> None:
        while self.waiting and len(self.running) < self._max_num_seqs:
            request = self.waiting[0]
            if not draft.open_to(request) or not self._admissible(request, draft):
                return
            slot = self._admit(request)
            if slot is None:
                return
            # What is mapped in its slot was free and is its own now.
            draft.free_bytes -= self._ledger.kv.mapped_bytes(slot)
            share = draft.largest_share(request)
            if share is None:
                return
            draft.add(share)

    def _admissible(self, request: Request, draft: _Draft) -> bool:
        """Whether the whole prompt fits, beside this step's chunks, what is left of the prompts
        that run, and one more chunk for each that runs: else it would only take memory that
        they need next, and be preempted for it."""
        if request.params.needs_state:
            taken = sum(r.params.needs_state for r in self.running)
            if taken >= self._state_rows:
                return False
        if not self.running:
            return True  # alone: the engine checked that it fits
        ledger = self._ledger
        prompt_chunks = ledger.chunks_for(request.num_tokens + 1)
        unfinished = sum(
            ledger.missing_chunks(r.slot, r.num_tokens)
            for r in self.running
            if r.slot is not None and r.remaining > 1
        )
        headroom = sum(
            ledger.chunks_for(r.max_total_tokens) > ledger.chunks_for(r.num_tokens)
            for r in self.running
        )
        wanted = max(draft.chunks, unfinished) + prompt_chunks + headroom
        rows = min(self._max_batch_tokens, draft.rows + request.remaining)
        while True:
            need = self._need_bytes(rows, len(draft.shares) + 1, draft.mode, False)
            if wanted * ledger.chunk_bytes + need <= draft.free_bytes:
                return True
            below = self._rows_below(rows)
            if below is None or below <= draft.rows:
                return False
            rows = below

    def _admit(self, request: Request) -> int | None:
        """Gives the request a slot; None when steps in flight still hold the last one."""
        try:
            slot = self._ledger.kv.take_slot(request.num_tokens + 1)
        except OutOfMemory:
            return None
        self._ledger.truncate(slot, request.num_tokens + 1)
        request.slot = slot
        request.status = Status.RUNNING
        self.waiting.popleft()
        self.running.append(request)
        return slot

    def _pressure(self, share: Share, draft: _Draft) -> MemoryPressure:
        rows, seqs = draft.rows + share.count, len(draft.shares) + 1
        need = self._need_bytes(rows, seqs, draft.mode | share.mode, draft.exact)
        assert share.request.slot is not None
        chunks = draft.chunks + self._ledger.missing_chunks(
            share.request.slot, share.begin + share.count
        )
        return MemoryPressure(
            f"a step of {rows} tokens needs {format_bytes(need)} beside "
            f"{format_bytes(chunks * self._ledger.chunk_bytes)} of KV cache, and "
            f"{format_bytes(draft.free_bytes)} are free; raise device_memory"
        )

    def trim_running(self) -> bool:
        """Unmaps what slots hold beyond their request's tokens; True if anything was. No step may
        be in flight."""
        before = self._ledger.kv.stats()["active_bytes"]
        for request in self.running:
            if request.slot is not None:
                self._ledger.truncate(request.slot, request.num_tokens)
        return self._ledger.kv.stats()["active_bytes"] < before

    def victim(self) -> Request | None:
        """Who makes room under pressure: the last admitted, unless it is the only one."""
        return self.running[-1] if len(self.running) > 1 else None

    def requeue(self, request: Request) -> None:
        """Puts a request that lost its slot before all that wait."""
        self.running.remove(request)
        request.restart()
        self.waiting.appendleft(request)
