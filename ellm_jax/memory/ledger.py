"""Takes everything a step needs from the one pool, together or not at all.

Inflation and deflation happen here: KV short of chunks takes what activations keep unused, and
activations that grow take slots of ended requests, then cached prefixes (eLLM section 4.2).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from ellm_jax._native import OutOfMemory
from ellm_jax.memory.balloon import Balloon
from ellm_jax.memory.events import EventLog
from ellm_jax.memory.lockstep import AnyArena, AnyKv, AnyPool, LockstepPool
from ellm_jax.memory.prefix import PrefixCache

_log = logging.getLogger(__name__)

OWNERS = ("free", "kv", "cache", "activation", "weights", "workspace")
"""Whose bytes add up to the limit."""


@dataclass(eq=False)
class Lease:
    """What a dispatched step holds; given back with `Ledger.finish`."""

    need_bytes: int


class Ledger:
    """The engine's view of the pool.

    Steps execute one after the other even when two are in flight, so what activations need is the
    largest need among the steps in flight, not the sum. Not thread-safe: one thread plans.

    Attributes:
        kv: the slots.
        prefix: the cached prefixes; None where they are not kept.
        events: what moved, and why.
    """

    def __init__(
        self,
        pool: AnyPool,
        kv: AnyKv,
        events: EventLog,
        *,
        balloon: Balloon,
        prefix_caching: bool,
        floor_bytes: int = 0,
        arena: AnyArena | None = None,
    ):
        """Takes the pool and the KV cache over it.

        Args:
            pool: the one pool, with the weights and the engine's own arrays counted in it.
            kv: slots over it.
            events: where moves are recorded.
            balloon: steers the allocator that weights, arrays and activations come from.
            prefix_caching: keep finished prefixes for reuse.
            floor_bytes: what activations hold at all times, needed or not: a static reservation.
            arena: activation virtual tensors, where the kernels take their workspaces.
        """
        self._pool = pool
        self.kv = kv
        self.events = events
        self._balloon = balloon
        self.prefix = PrefixCache(pool.cache, pool.uncache) if prefix_caching else None
        self._arena = arena
        self.chunk_bytes = pool.chunk_bytes
        self.tile_tokens = kv.layout.tile_tokens
        self.floor_bytes = floor_bytes
        self._leases: list[Lease] = []
        self._needed = 0  # by the steps in flight
        self._held = 0  # needed, the floor, and what is kept for the next step
        usage = pool.usage()
        self._fixed = usage["weights"] + usage["workspace"]  # of XLA's allocator, beside `_held`
        self._taken: dict[int, int] = {}  # chunks by slot, those being mapped included
        self._premapped: dict[int, int] = {}  # slots with such: their chunks before
        self._hold(floor_bytes)
        # What loading and compiling have left with the allocator is nobody's.
        self._trim_balloon(floor_bytes)
        self._balloon.keep(self._fixed + floor_bytes)

    # What there is.

    @property
    def room_bytes(self) -> int:
        """What the next step may take for its need and its chunks: free bytes, what activations
        hold now or keep unused, and cached prefixes that nobody uses."""
        evictable = self.prefix.evictable if self.prefix else 0
        room = self._pool.usage()["free"] + self._held + evictable * self.chunk_bytes
        return room if self._arena is None else room + self._arena.usage()["inactive"]

    @property
    def capacity_bytes(self) -> int:
        """What a request could take if it were alone: the limit less the fixed owners."""
        usage = self._pool.usage()
        return usage["limit"] - usage["weights"] - usage["workspace"]

    def chunks_for(self, tokens: int) -> int:
        """Chunks that hold so many tokens of one request."""
        return -(-tokens // self.tile_tokens)

    def missing_chunks(self, slot: int, tokens: int) -> int:
        """Chunks to take before `slot` holds so many tokens."""
        return max(0, -(-tokens // self.tile_tokens) - self._taken[slot])

    def taken_tokens(self, slot: int) -> int:
        """Tokens that fit the chunks of a slot."""
        return self._taken[slot] * self.tile_tokens

    def taken_bytes(self, slot: int) -> int:
        """Bytes of the chunks of a slot."""
        return self._taken[slot] * self.chunk_bytes

    # Slots.

    def open_slot(self, tokens: int, shared: Sequence[int] = ()) -> int:
        """A slot for about `tokens` tokens, nothing mapped beyond them, the chunks `shared` as its
        first ones.

        Raises:
            OutOfMemory: every slot is in use, or held by steps in flight.
            RuntimeError: the system refused to map; nothing changed.
        """
        if not shared:
            slot = self.kv.take_slot(tokens)
            self._taken[slot] = self.chunks_for(self.kv.mapped_tokens(slot))
            self.truncate(slot, tokens)
            return slot
        slot = self.kv.take_empty_slot()
        try:
            self.kv.map_shared(slot, shared)
        except BaseException:
            self.kv.release(slot)
            raise
        self._taken[slot] = len(shared)
        return slot

    def release(self, slot: int) -> None:
        """Ends a request's hold on its slot. Where the system refuses to unmap, the slot is out of
        use until a later trim repairs it; that is logged, and nobody's answer depends on it."""
        del self._taken[slot]
        self._premapped.pop(slot, None)
        try:
            self.kv.release_async(slot)
        except RuntimeError as error:
            _log.warning("slot %d is out of use: %s", slot, error)

    def truncate(self, slot: int, tokens: int) -> None:
        """Unmaps what a slot holds beyond so many tokens. Where the system refuses, the memory
        stays with the slot, or the slot breaks and the next step that names it is refused."""
        if self._taken[slot] <= self.chunks_for(tokens):
            return
        self._premapped.pop(slot, None)
        try:
            self.kv.truncate(slot, tokens)
        except RuntimeError as error:
            _log.warning("slot %d could not be made smaller: %s", slot, error)
        self._taken[slot] = self.chunks_for(self.kv.mapped_tokens(slot))

    def trim_slots(self, tokens_by_slot: dict[int, int]) -> bool:
        """Unmaps what slots hold beyond their tokens; True if anything was. No step may be in
        flight."""
        before = sum(self._taken.values())
        for slot, tokens in tokens_by_slot.items():
            self.truncate(slot, tokens)
        return sum(self._taken.values()) < before

    # Steps.

    def reserve(self, need_bytes: int, slots: Sequence[int], tokens: Sequence[int]) -> Lease:
        """Takes a step's need and maps slots[i] for tokens[i] tokens; all of it or nothing.

        Raises:
            OutOfMemory: the pool is short; nothing changed but that unused memory (slots of ended
                requests, cached prefixes, what activations keep) may have been given up.
            RuntimeError: the system refused to map; likewise.
        """
        lease = Lease(need_bytes)
        held = self._held
        self._take(max(need_bytes, self._needed, self.floor_bytes), slots, tokens, held)
        self._leases.append(lease)
        self._needed = max(self._needed, need_bytes)
        return lease

    def extend(self, slot: int, tokens: int) -> None:
        """Maps a slot for so many tokens apart from any step. Raises as `reserve`."""
        self._take(max(self._needed, self.floor_bytes), [slot], [tokens], self._held)

    def _take(self, wanted: int, slots: Sequence[int], tokens: Sequence[int], held: int) -> None:
        tile = self.tile_tokens
        taken = self._taken
        grow: list[tuple[int, int, int]] = []
        missing = 0
        premapped = self._premapped
        for slot, count in zip(slots, tokens, strict=True):
            chunks = -(-count // tile)
            lacking = chunks - taken[slot]
            if lacking > 0:
                grow.append((slot, count, chunks))
                missing += lacking
            elif slot in premapped and chunks > premapped[slot]:
                # `extend` waits for the mapping, and does it again where it failed.
                most = min(taken[slot] * tile, self.kv.layout.max_tokens)
                grow.append((slot, most, taken[slot]))
        if missing or wanted > held:
            self._make_room(wanted, missing)
            self._hold(max(wanted, self._held))
        if not grow:
            return
        try:
            self.kv.extend([slot for slot, _, _ in grow], [count for _, count, _ in grow])
        except BaseException:
            for slot, _, _ in grow:
                premapped.pop(slot, None)
                taken[slot] = self.chunks_for(self.kv.mapped_tokens(slot))
            self._hold(max(self._needed, self.floor_bytes, min(held, self._held)))
            raise
        for slot, _, chunks in grow:
            premapped.pop(slot, None)
            taken[slot] = chunks

    def premap(self, slots: Sequence[int], tokens: Sequence[int]) -> None:
        """Takes the chunks that slots[i] lacks for tokens[i] tokens ahead of the step that writes
        them, as far as they can be had for nothing, and maps them off this thread (eLLM section
        4.2, speculative pre-mapping)."""
        lacking = [
            (slot, count, self.missing_chunks(slot, count))
            for slot, count in zip(slots, tokens, strict=True)
        ]
        lacking = [entry for entry in lacking if entry[2]]
        if not lacking:
            return
        got = self.kv.premap([slot for slot, _, _ in lacking], [count for _, count, _ in lacking])
        for slot, _, missing in lacking:
            if got <= 0:
                return
            self._premapped.setdefault(slot, self._taken[slot])
            self._taken[slot] += min(got, missing)
            got -= missing

    def finish(self, lease: Lease) -> None:
        """Gives back a step's need, once the step is over. What the activations' allocator keeps
        for the next one stays theirs, until KV is short of it."""
        self._leases.remove(lease)
        self._needed = max((other.need_bytes for other in self._leases), default=0)
        keep = max(self._needed, self.floor_bytes, min(self._held, self._balloon.retained_bytes))
        if self._held > keep:
            self._hold(keep)

    def quiesce(self) -> None:
        """Waits until nothing that was started on the device touches its memory any more: after a
        failed step, of which a part may still run, before anything it names is given up. What the
        device says is logged: it has failed, or some of what it did has."""
        try:
            self._pool.synchronize()
        except RuntimeError as error:
            _log.warning("after a failed step: %s", error)

    # Moving memory.

    def _make_room(self, wanted: int, chunks: int) -> None:
        """Frees what activations of `wanted` bytes and so many chunks lack, mildest means first:
        slots of ended requests, then what activations keep unused, then cached prefixes."""
        grown = max(0, wanted - self._held)
        usage = self._pool.usage()
        short = grown + chunks * self.chunk_bytes - usage["obtainable"]
        if short <= 0:
            return
        begin = self.events.clock()
        if usage["available"]:
            given = self.kv.reclaim(short)
            short -= given
            if grown and given:
                self.events.add("deflate", min(given, grown), "slots of ended requests", begin)
        if short > 0:
            short -= self._inflate(wanted, short, chunks)
        if short > 0 and self.prefix is not None:
            begin = self.events.clock()
            given = self.prefix.evict(-(-short // self.chunk_bytes))
            if given:
                cause = "activations" if grown else "KV"
                self.events.add("evict", given, cause, begin)
                if grown:
                    self.events.add("deflate", min(given, grown), "cached prefixes", begin)

    def _inflate(self, wanted: int, short: int, chunks: int) -> int:
        """Takes what activations keep unused: inactive tensors, and beyond `wanted` what their
        allocator keeps. Returns the bytes."""
        begin = self.events.clock()
        given = 0 if self._arena is None else self._arena.collect(short)
        if given < short and self._held > wanted:
            given += self._held - wanted
            self._balloon.trim(self._fixed + wanted)
            self._hold(wanted)
        if given:
            self.events.add("inflate", given, f"{chunks} chunks of KV", begin)
        return given

    def _hold(self, count_bytes: int) -> None:
        """Makes the activations' share exactly so large."""
        change = count_bytes - self._held
        if not change:
            return
        if change > 0:
            try:
                self._pool.reserve("activation", change)
            except OutOfMemory:
                self.kv.reclaim(change)
                self._pool.reserve("activation", change)
        else:
            self._pool.give_back("activation", -change)
        self._held = count_bytes
        self._balloon.keep(self._fixed + count_bytes)

    def trim(self) -> int:
        """Gives memory that nobody uses back to the system, as far as the system takes it; cached
        prefixes stay. Returns the bytes that went. No step may be in flight."""
        begin = self.events.clock()
        before = self._pool.usage()["physical"]
        try:
            self.kv.settle()
            self.kv.trim_available()
            self._collect()
            self._pool.trim(0)
        except RuntimeError as error:
            _log.warning("unused memory could not be given back: %s", error)
        self._give_unused_activations()
        given = before - self._pool.usage()["physical"]
        if given > 0:
            self.events.add("trim", given, "idle", begin)
        return given

    def make_way(self) -> None:
        """Gives back free chunks and what activations keep unused, for what takes memory of the
        device that nobody counts here, as compiling does. Steps may be in flight; they are waited
        for."""
        try:
            self._pool.trim(0)
        except RuntimeError as error:
            _log.warning("free chunks could not be given back: %s", error)
        self._give_unused_activations()

    def _give_unused_activations(self) -> None:
        """Takes from activations what no step in flight needs. Where the system refuses, they hold
        it still, and nobody else is given it."""
        idle = max(self._needed, self.floor_bytes)
        if self._trim_balloon(idle):
            self._hold(idle)

    def _trim_balloon(self, activation_bytes: int) -> bool:
        """Has the activations' allocator give back what it holds beyond so much; False if that
        failed."""
        try:
            self._balloon.trim(self._fixed + activation_bytes)
        except RuntimeError as error:
            _log.warning("what activations keep unused could not be given back: %s", error)
            return False
        return True

    def repair(self) -> bool:
        """Tries again to unmap slots that broke when the system refused; True if memory came back.
        No step may be in flight."""
        broken = self.kv.stats()["broken_bytes"]
        if not broken:
            return False
        try:
            self.kv.settle()
            self.kv.reclaim(broken)
        except RuntimeError as error:
            _log.warning("broken slots could not be repaired: %s", error)
        return self.kv.stats()["broken_bytes"] < broken

    def is_broken(self, slot: int) -> bool:
        """Whether a slot is out of use because the system refused to unmap something of it."""
        return self.kv.slot_state(slot) == "broken"

    def drop_prefixes(self) -> None:
        """Gives all cached prefixes up that nobody uses."""
        if self.prefix is not None and self.prefix.evictable:
            begin = self.events.clock()
            given = self.prefix.evict(self.prefix.evictable)
            self.events.add("evict", given, "asked for", begin)

    def resize(self, limit_bytes: int) -> None:
        """Sets the limit, giving up what nobody uses.

        Raises:
            OutOfMemory: what is in use does not fit; the old limit stays.
            RuntimeError: the system refused to take memory back; likewise.
        """
        usage = self._pool.usage()
        if limit_bytes < usage["limit"]:
            idle = max(self._needed, self.floor_bytes)
            in_use = usage["limit"] - usage["free"] - (self._held - idle)
            if in_use > limit_bytes and self.prefix is not None:
                self.prefix.evict(-(-(in_use - limit_bytes) // self.chunk_bytes))
            self.trim()
        self._pool.resize(limit_bytes)

    def take_weights(self, count_bytes: int) -> None:
        """Counts weights that come back. Raises OutOfMemory where they do not fit."""
        self._make_room(self._held + count_bytes, 0)
        self._pool.reserve("weights", count_bytes)
        self._fixed += count_bytes
        self._balloon.keep(self._fixed + self._held)

    def give_weights(self, count_bytes: int) -> None:
        """Counts weights that went."""
        self._pool.give_back("weights", count_bytes)
        self._fixed -= count_bytes
        self._balloon.keep(self._fixed + self._held)

    def close(self) -> None:
        """Unmaps everything and gives it back to the system. No step may be in flight."""
        if self.prefix is not None:
            self.prefix.clear()
        self._hold(0)
        self._collect()
        self.kv.close()
        self._pool.trim(0)

    def _collect(self) -> None:
        if self._arena is not None:
            self._arena.collect(self._arena.usage()["inactive"])

    # What others look at.

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
        if isinstance(self._pool, LockstepPool):
            self._pool.check()
        usage = self._pool.usage()
        total = sum(usage[owner] for owner in OWNERS)
        assert total == usage["limit"], f"ledger is off by {total - usage['limit']}: {usage}"
        assert usage["activation"] >= self._held >= self._needed, f"activations: {usage}"
