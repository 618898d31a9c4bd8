"""A host tier whose copies take fake time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ellm_jax._native import KvCache, OutOfMemory
from ellm_jax.memory.host_tier import Buffer
from ellm_jax.sim.clock import FakeClock
from ellm_jax.sim.contents import GARBAGE, Contents


class SimBuffer:
    """Blocks of host memory that are only counted; the interface of the native `HostBuffer`.

    Attributes:
        taken: blocks that belong to somebody.
    """

    def __init__(self, block_bytes: int, limit_bytes: int):
        """Takes the size of a block and of all."""
        self._block_bytes = block_bytes
        self._limit_bytes = limit_bytes
        self._peak = 0
        self._physical = 0
        self.taken: set[int] = set()
        self._spare: list[int] = []

    def take(self, n: int, /) -> list[int]:
        """So many blocks; OutOfMemory and none otherwise."""
        if (len(self.taken) + n) * self._block_bytes > self._limit_bytes:
            raise OutOfMemory(f"{n} blocks asked for, {len(self.taken)} are taken")
        while len(self._spare) < n:
            self._spare.append(self._physical)
            self._physical += 1
        ids = [self._spare.pop() for _ in range(n)]
        self.taken.update(ids)
        self._peak = max(self._peak, len(self.taken))
        return ids

    def give_back(self, ids: Sequence[int], /) -> None:
        """Frees blocks."""
        assert self.taken.issuperset(ids), f"{ids} are given back, but not all are taken"
        assert len(set(ids)) == len(ids), f"{ids} are given back twice"
        self.taken.difference_update(ids)
        self._spare += ids

    def close(self) -> None:
        """It has no thread."""

    def usage(self) -> dict[str, int]:
        """Bytes: "limit", "used", "free", "peak_used", "physical"."""
        used = len(self.taken) * self._block_bytes
        return {
            "limit": self._limit_bytes,
            "used": used,
            "free": self._limit_bytes - used,
            "peak_used": self._peak * self._block_bytes,
            "physical": used + len(self._spare) * self._block_bytes,
        }

    def resize(self, limit_bytes: int, /) -> None:
        """Sets the limit; OutOfMemory below what is taken."""
        if len(self.taken) * self._block_bytes > limit_bytes:
            raise OutOfMemory(f"{len(self.taken)} blocks are taken, more than {limit_bytes} bytes")
        self._limit_bytes = limit_bytes

    def trim(self) -> int:
        """Forgets the blocks that nobody has; returns their bytes."""
        given = len(self._spare) * self._block_bytes
        self._spare.clear()
        return given


@dataclass(slots=True)
class _Copy:
    ticket: int
    out: bool
    slot: int
    first_tile: int
    blocks: list[int]
    buffer: SimBuffer
    end_s: float
    fails: bool
    before: list[tuple[int, list[int]]]


class SimCopier:
    """Copies one after the other at a bandwidth; the interface of the native `Copier`.

    With `contents` it moves them, and asserts what callers of the native one have to promise: that
    chunks stay mapped, and unchanged, until a copy is done.
    """

    def __init__(
        self,
        clock: FakeClock,
        bytes_per_s: float,
        contents: Contents | None = None,
        fails: Callable[[], bool] = lambda: False,
    ):
        """`fails` is asked once per copy whether it will."""
        self._clock = clock
        self._bytes_per_s = bytes_per_s
        self._contents = contents
        self._fails = fails
        self._queue: deque[_Copy] = deque()
        self._failed: set[int] = set()
        self._free_s = 0.0
        self._last = 0

    def offload(
        self, kv: KvCache, slot: int, first_tile: int, buffer: Buffer, blocks: Sequence[int], /
    ) -> int:
        """Starts copying tiles of a slot to blocks; returns a ticket."""
        return self._start(True, kv, slot, first_tile, buffer, blocks)

    def fetch(
        self, kv: KvCache, slot: int, first_tile: int, buffer: Buffer, blocks: Sequence[int], /
    ) -> int:
        """Starts copying blocks to tiles of a slot; returns a ticket."""
        return self._start(False, kv, slot, first_tile, buffer, blocks)

    def _start(
        self,
        out: bool,
        kv: KvCache,
        slot: int,
        first_tile: int,
        buffer: Buffer,
        blocks: Sequence[int],
    ) -> int:
        assert isinstance(buffer, SimBuffer)
        self._finish_due()
        size_bytes = len(blocks) * kv.layout.chunk_bytes
        begin_s = max(self._clock(), self._free_s)
        self._free_s = begin_s + size_bytes / self._bytes_per_s
        self._last += 1
        before = []
        if self._contents is not None:
            before = self._contents.read(slot, first_tile, len(blocks))
        self._queue.append(
            _Copy(
                self._last,
                out,
                slot,
                first_tile,
                list(blocks),
                buffer,
                self._free_s,
                self._fails(),
                before,
            )
        )
        return self._last

    def done(self, ticket: int, /) -> bool:
        """Whether a copy is over."""
        self._finish_due()
        return not self._queue or ticket < self._queue[0].ticket

    def wait(self, ticket: int, /) -> None:
        """Lets time pass until a copy is over; RuntimeError if it failed."""
        for copy in self._queue:
            if copy.ticket == ticket:
                self._clock.wait_until(copy.end_s)
        self._finish_due()
        if ticket in self._failed:
            raise RuntimeError(f"copy {ticket} failed, as it was told to")

    def close(self) -> None:
        """Ends; what was not done will never be."""
        self._queue.clear()

    def _finish_due(self) -> None:
        while self._queue and self._queue[0].end_s <= self._clock():
            copy = self._queue.popleft()
            if self._contents is not None:
                self._move(copy, self._contents)
            if copy.fails:
                self._failed.add(copy.ticket)

    def _move(self, copy: _Copy, contents: Contents) -> None:
        assert copy.buffer.taken.issuperset(copy.blocks), "blocks were given back during a copy"
        state = contents.slot_state(copy.slot)
        assert state in ("active", "broken"), f"slot {copy.slot} was released during a copy"
        before = [held for _, held in copy.before]
        garbage = [[GARBAGE] * len(held) for held in before]
        if state == "broken":
            # The native one refuses to touch it.
            copy.fails = True
        else:
            now = contents.read(copy.slot, copy.first_tile, len(copy.blocks))
            assert [chunk for chunk, _ in now] == [chunk for chunk, _ in copy.before], (
                f"slot {copy.slot} was mapped anew during a copy"
            )
        # What is written behind the tokens that are to be copied, in the last tile, is not asked
        # for; so the tiles of the start are as good as those of the end.
        if copy.out:
            contents.store(copy.blocks, garbage if copy.fails else before)
        elif state == "active":
            contents.load(copy.slot, copy.first_tile, copy.blocks, good=not copy.fails)
