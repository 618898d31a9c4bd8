"""Takes everything a step needs from the one pool, together or not at all."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from ellm_jax._native import KvCache, OutOfMemory, Pool

_log = logging.getLogger(__name__)

OWNERS = ("free", "kv", "cache", "activation", "weights", "workspace")
"""Whose bytes add up to the limit."""


@dataclass(eq=False)
class Lease:
    """What a dispatched step holds; given back with `Ledger.finish`."""

    need_bytes: int


class Ledger:
    """The engine's view of the pool.

    Steps execute one after the other even when two are in flight, so what activations hold is the
    largest need among the steps in flight, not the sum. Not thread-safe: one thread plans.
    """

    def __init__(self, pool: Pool, kv: KvCache):
        """Takes the pool, with the weights already in it, and the KV cache over it."""
        self._pool = pool
        self.kv = kv
        self.chunk_bytes = pool.chunk_bytes
        self._leases: list[Lease] = []
        self._activation_bytes = 0

    @property
    def free_bytes(self) -> int:
        """What the next step may take for its need and its chunks: free bytes, mapped slots of
        ended requests and the need of steps in flight included."""
        return self._pool.usage()["free"] + self._activation_bytes

    @property
    def capacity_bytes(self) -> int:
        """What a request could take if it were alone: the limit less the fixed owners."""
        usage = self._pool.usage()
        return usage["limit"] - usage["weights"] - usage["workspace"]

    def missing_chunks(self, slot: int, tokens: int) -> int:
        """Chunks to map before `slot` holds so many tokens."""
        missing = tokens - self.kv.mapped_tokens(slot)
        return max(0, -(-missing // self.kv.layout.tile_tokens))

    def chunks_for(self, tokens: int) -> int:
        """Chunks that hold so many tokens of one request."""
        return -(-tokens // self.kv.layout.tile_tokens)

    def reserve(self, need_bytes: int, slots: Sequence[int], tokens: Sequence[int]) -> Lease:
        """Takes a step's need and maps slots[i] for tokens[i] tokens; all of it or nothing.

        Raises:
            OutOfMemory: the pool is short; nothing changed but that slots of ended requests may
                have been unmapped.
            RuntimeError: the system refused to map; likewise.
        """
        self._hold(max(need_bytes, self._activation_bytes))
        try:
            self.kv.extend(list(slots), list(tokens))
        except BaseException:
            self._hold(self._largest_need())
            raise
        lease = Lease(need_bytes)
        self._leases.append(lease)
        return lease

    def finish(self, lease: Lease) -> None:
        """Gives back a step's need, once the step is over."""
        self._leases.remove(lease)
        self._hold(self._largest_need())

    def _largest_need(self) -> int:
        return max((lease.need_bytes for lease in self._leases), default=0)

    def _hold(self, need_bytes: int) -> None:
        """Makes the activations' share exactly so large."""
        change = need_bytes - self._activation_bytes
        if change > 0:
            try:
                self._pool.reserve("activation", change)
            except OutOfMemory:
                self.kv.reclaim(change)
                self._pool.reserve("activation", change)
        elif change < 0:
            self._pool.give_back("activation", -change)
        self._activation_bytes = need_bytes

    def release(self, slot: int) -> None:
        """Ends a request's hold on its slot. Where the system refuses to unmap, the slot is out of
        use until a later trim repairs it; that is logged, and nobody's answer depends on it."""
        try:
            self.kv.release(slot)
        except RuntimeError as error:
            _log.warning("slot %d is out of use: %s", slot, error)

    def truncate(self, slot: int, tokens: int) -> None:
        """Unmaps what a slot holds beyond so many tokens. Where the system refuses, the memory
        stays with the slot, or the slot breaks and the next step that names it is refused."""
        try:
            self.kv.truncate(slot, tokens)
        except RuntimeError as error:
            _log.warning("slot %d could not be made smaller: %s", slot, error)

    def trim(self) -> None:
        """Gives memory that nobody uses back to the system, as far as the system takes it."""
        try:
            self.kv.trim_available()
            self._pool.trim(0)
        except RuntimeError as error:
            _log.warning("unused memory could not be given back: %s", error)

    def close(self) -> None:
        """Unmaps everything and gives it back to the system. No step may be in flight."""
        self.kv.close()
        self._pool.trim(0)

    def usage(self) -> dict[str, int]:
        """Bytes by owner, with limit and peaks; see the native `Pool.usage`."""
        return self._pool.usage()

    def reset_peaks(self) -> None:
        """Starts the peaks anew."""
        self._pool.reset_peaks()

    def check(self) -> None:
        """Asserts that owners and free bytes add up to the limit.

        Raises:
            AssertionError: they do not; with the numbers.
        """
        usage = self._pool.usage()
        total = sum(usage[owner] for owner in OWNERS)
        assert total == usage["limit"], f"ledger is off by {total - usage['limit']}: {usage}"
