"""What requests take of the device's memory: alone, and beside those that run."""

from __future__ import annotations

from collections.abc import Iterable

from ellm_jax.memory.ledger import Ledger
from ellm_jax.request import Request
from ellm_jax.runtime.shapes import StepMode
from ellm_jax.scheduler.plan import NeedBytes


class Demand:
    """Counts the chunks and the need that requests will come to take. Changes nothing."""

    def __init__(self, ledger: Ledger, need_bytes: NeedBytes, smallest_prefill: int):
        """Args:
        ledger: the memory.
        need_bytes: what a step takes.
        smallest_prefill: rows of the smallest piece of a prompt worth computing.
        """
        self._ledger = ledger
        self._need_bytes = need_bytes
        self._smallest_prefill = smallest_prefill
        self._smallest_need: int | None = None

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

    def unfinished_chunks(self, running: Iterable[Request]) -> int:
        """Chunks that are still to be taken for the prompts of those that run."""
        return sum(self._missing(r) for r in running if r.remaining > 1)

    def _missing(self, request: Request) -> int:
        assert request.slot is not None
        return self._ledger.missing_chunks(request.slot, request.num_tokens)

    def next_chunks(self, requests: Iterable[Request]) -> int:
        """One more chunk for each of these that will grow beyond those its tokens take."""
        ledger = self._ledger
        return sum(
            ledger.chunks_for(r.max_total_tokens) > ledger.chunks_for(r.num_tokens)
            for r in requests
        )

    def decoding_bytes(self, requests: int) -> int:
        """What activations hold while so many requests decode."""
        need = self._need_bytes(requests, requests, StepMode(), False)
        return max(self._ledger.floor_bytes, need)
