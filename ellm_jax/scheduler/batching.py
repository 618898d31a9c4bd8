"""Plans the next step: decodes first, then prompts in chunks, then new requests while they fit."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ellm_jax._native import OutOfMemory
from ellm_jax.memory.ledger import Ledger
from ellm_jax.request import Request, Status


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


@dataclass(frozen=True)
class Plan:
    """A step to run.

    Attributes:
        shares: one per request, at least one.
        need_bytes: what the step takes beyond its arguments.
    """

    shares: tuple[Share, ...]
    need_bytes: int


class MemoryPressure(Exception):
    """The requests that run cannot all go on with the memory there is: one has to make room."""


class Scheduler:
    """Requests in order: `running` by admission, oldest first, and `waiting` by arrival.

    Plain bookkeeping: it takes slots and counts chunks, the caller reserves and dispatches. A
    request is admitted when its prompt fits beside what those that run are known to need.
    """

    def __init__(
        self,
        ledger: Ledger,
        need_bytes: Callable[[int, int], int],
        rows_below: Callable[[int], int | None],
        max_num_seqs: int,
        max_batch_tokens: int,
    ):
        """Args:
        ledger: the memory.
        need_bytes: (token rows, sequences) -> what such a step takes beyond its arguments.
        rows_below: the next smaller number of rows worth trying when a need does not fit.
        max_num_seqs: most requests that run.
        max_batch_tokens: most tokens of a step.
        """
        self._ledger = ledger
        self._need_bytes = need_bytes
        self._rows_below = rows_below
        self._max_num_seqs = max_num_seqs
        self._max_batch_tokens = max_batch_tokens
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

    def plan(self, *, admit: bool = True) -> Plan | None:
        """The next step, or None when nothing can be computed right now.

        New requests that are part of it have a slot and are in `running` when this returns; no
        memory is mapped yet.

        Raises:
            MemoryPressure: not even the decodes, or the smallest piece of the oldest prompt, fit.
        """
        shares: list[Share] = []
        chunks = 0
        free = self._ledger.free_bytes

        def fits(extra_chunks: int, rows: int, seqs: int) -> bool:
            taken = (chunks + extra_chunks) * self._ledger.chunk_bytes
            return taken + self._need_bytes(rows, seqs) <= free

        def missing(request: Request, count: int) -> int:
            assert request.slot is not None
            return self._ledger.missing_chunks(request.slot, request.computed + count)

        rows = 0
        for request in self.running:
            if request.remaining == 1 and rows < self._max_batch_tokens:
                chunks += missing(request, 1)
                shares.append(self._share(request, 1))
                rows += 1
        if shares and not fits(0, rows, len(shares)):
            raise MemoryPressure

        for request in self.running:
            if request.remaining > 1:
                count = self._largest_chunk(request, rows, len(shares) + 1, missing, fits)
                if count == 0:
                    if not shares:
                        raise MemoryPressure
                    break
                chunks += missing(request, count)
                shares.append(self._share(request, count))
                rows += count

        while (
            admit
            and self.waiting
            and len(self.running) < self._max_num_seqs
            and rows < self._max_batch_tokens
        ):
            request = self.waiting[0]
            if not self._admissible(request, chunks, rows, len(shares) + 1, free):
                break
            slot = self._admit(request)
            if slot is None:
                break
            # What is mapped in its slot was free and is its own now.
            free -= self._ledger.kv.mapped_bytes(slot)
            count = self._largest_chunk(request, rows, len(shares) + 1, missing, fits)
            if count == 0:
                break
            chunks += missing(request, count)
            shares.append(self._share(request, count))
            rows += count

        if not shares:
            return None
        return Plan(tuple(shares), self._need_bytes(rows, len(shares)))

    def _share(self, request: Request, count: int) -> Share:
        return Share(request, request.computed, count, samples=count == request.remaining)

    def _largest_chunk(
        self,
        request: Request,
        rows: int,
        seqs: int,
        missing: Callable[[Request, int], int],
        fits: Callable[[int, int, int], bool],
    ) -> int:
        """Most tokens of a prompt that this step can take besides `rows` others."""
        count = min(request.remaining, self._max_batch_tokens - rows)
        while count > 0 and not fits(missing(request, count), rows + count, seqs):
            smaller = self._rows_below(rows + count)
            count = 0 if smaller is None else smaller - rows
        return max(0, count)

    def _admissible(self, request: Request, chunks: int, rows: int, seqs: int, free: int) -> bool:
        """Whether the whole prompt fits, beside this step's chunks, what is left of the prompts
        that run, and one more chunk for each that runs: else it would only take memory that
        they need next, and be preempted for it."""
        ledger = self._ledger
        prompt_chunks = ledger.chunks_for(request.num_tokens + 1)
        unfinished = sum(
            ledger.missing_chunks(r.slot, r.num_tokens)
            for r in self.running
            if r.slot is not None and r.remaining > 1
        )
        headroom = sum(
            1
            for r in self.running
            if ledger.chunks_for(r.max_total_tokens) > ledger.chunks_for(r.num_tokens)
        )
        wanted = (max(chunks, unfinished) + prompt_chunks + headroom) * ledger.chunk_bytes
        smallest = min(self._max_batch_tokens, rows + request.remaining)
        while wanted + self._need_bytes(smallest, seqs) > free:
            below = self._rows_below(smallest)
            if below is None or below <= rows:
                # Alone it is let in whatever the headroom says: the engine checked that it fits.
                return not self.running
            smallest = below
        return True

    def _admit(self, request: Request) -> int | None:
        """Gives the request a slot; None when steps in flight still hold the last one."""
        kv = self._ledger.kv
        try:
            slot = kv.take_slot(request.num_tokens + 1)
        except OutOfMemory:
            return None
        kv.truncate(slot, request.max_total_tokens)
        request.slot = slot
        request.status = Status.RUNNING
        self.waiting.popleft()
        self.running.append(request)
        return slot

    def trim_running(self) -> bool:
        """Unmaps what slots hold beyond their request's tokens, left from requests before; True if
        anything was. No step may be in flight."""
        kv = self._ledger.kv
        before = kv.stats()["active_bytes"]
        for request in self.running:
            if request.slot is not None:
                kv.truncate(request.slot, request.num_tokens)
        return kv.stats()["active_bytes"] < before

    def victim(self) -> Request | None:
        """Who makes room under pressure: the last admitted, unless it is the only one."""
        return self.running[-1] if len(self.running) > 1 else None

    def requeue(self, request: Request) -> None:
        """Puts a request that lost its slot before all that wait."""
        self.running.remove(request)
        request.restart()
        self.waiting.appendleft(request)
