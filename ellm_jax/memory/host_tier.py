"""KV in host memory: which tiles of a request lie there, and the copies on their way.

What has been copied out stays valid while the request goes on, because K and V are never written
twice. So a copy is kept when its request comes back, as long as nobody needs the room, and the
next time only what is new has to be copied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ellm_jax._native import OutOfMemory
from ellm_jax.memory.events import EventLog
from ellm_jax.memory.lockstep import AnyKv


class Buffer(Protocol):
    """The native `HostBuffer`, or the simulator's."""

    def take(self, n: int, /) -> list[int]:
        """So many blocks, or OutOfMemory."""

    def give_back(self, ids: Sequence[int], /) -> None:
        """Frees blocks."""

    def usage(self) -> dict[str, int]:
        """Bytes: "limit", "used", "free", "peak_used", "physical"."""

    def resize(self, limit_bytes: int, /) -> None:
        """Sets the limit; OutOfMemory below what is used."""

    def trim(self) -> int:
        """Gives unused blocks back to the system."""

    def close(self) -> None:
        """Ends what it does on a thread of its own."""


class CopyEngine(Protocol):
    """The native `Copier`, or the simulator's."""

    def offload(
        self, kv: Any, slot: int, first_tile: int, buffer: Any, blocks: Sequence[int], /
    ) -> int:
        """Starts copying chunks of a slot to blocks; returns a ticket."""

    def fetch(
        self, kv: Any, slot: int, first_tile: int, buffer: Any, blocks: Sequence[int], /
    ) -> int:
        """Starts copying blocks to chunks of a slot; returns a ticket."""

    def done(self, ticket: int, /) -> bool:
        """Whether it is over."""

    def wait(self, ticket: int, /) -> None:
        """Waits until it is over; RuntimeError if it failed."""

    def close(self) -> None:
        """Ends the thread."""


class CopyFailed(RuntimeError):
    """KV could not be copied; what was in host memory of it is lost."""


@dataclass(eq=False)
class HostCopy:
    """The part of one request's KV that lies in host memory.

    Attributes:
        request_id: whose.
        blocks: block of each leading tile, in order.
        tokens: how many leading tokens are valid there once the copies on their way are done.
        needed: whether it is the only copy: the request has no slot.
    """

    request_id: str
    blocks: list[int] = field(default_factory=list)
    tokens: int = 0
    needed: bool = False
    _out: list[tuple[int, int, float]] = field(default_factory=list)  # ticket, bytes, begin
    _in: tuple[int, int, float] | None = None


class HostTier:
    """The fixed buffer and what is in it. Used from one thread.

    Attributes:
        out_bytes, in_bytes: copied since the start.
    """

    def __init__(
        self,
        buffer: Buffer,
        copier: CopyEngine,
        kv: AnyKv,
        events: EventLog,
        observe_copy: Callable[[int, float], None] = lambda count_bytes, seconds: None,
    ):
        """Args:
        buffer: of blocks as large as a chunk.
        copier: copies on a thread of its own.
        kv: the slots that are copied from and to.
        events: where copies are recorded.
        observe_copy: told bytes and seconds of each copy.
        """
        self._buffer = buffer
        self._copier = copier
        self._kv = kv
        self._events = events
        self._observe_copy = observe_copy
        self.tile_tokens = kv.layout.tile_tokens
        self.block_bytes = kv.layout.chunk_bytes
        self._spare: dict[HostCopy, None] = {}  # copies of requests that have a slot, oldest first
        self.limit_bytes = buffer.usage()["limit"]
        self.needed_blocks = 0
        self.out_bytes = 0
        self.in_bytes = 0

    @property
    def needed_bytes(self) -> int:
        """Bytes of KV that lie nowhere else."""
        return self.needed_blocks * self.block_bytes

    @property
    def room_bytes(self) -> int:
        """What can still be taken, copies of requests that have a slot given up."""
        return self.limit_bytes - self.needed_bytes

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold so many tokens of one request."""
        return -(-tokens // self.tile_tokens)

    def room_for(self, tokens: int) -> bool:
        """Whether so many tokens of one more request fit."""
        return self.blocks_for(tokens) * self.block_bytes <= self.room_bytes

    # Out.

    def copy_out(self, copy: HostCopy, slot: int, tokens: int) -> None:
        """Starts copying what the copy lacks of a slot's first `tokens` tokens. They have to stay
        mapped and as they are until `out_done`.

        Raises:
            OutOfMemory: host memory is full; nothing was started.
            RuntimeError: the system refused more of it; likewise.
        """
        tile = self.tile_tokens
        first = copy.tokens // tile  # a tile that was not full has to be copied again
        end = self.blocks_for(tokens)
        if end <= first:
            return
        self._grow(copy, end)
        begin = self._events.clock()
        blocks = copy.blocks[first:end]
        ticket = self._copier.offload(self._kv, slot, first, self._buffer, blocks)
        copy._out.append((ticket, len(blocks) * self.block_bytes, begin))
        copy.tokens = tokens

    def _grow(self, copy: HostCopy, blocks: int) -> None:
        lacking = blocks - len(copy.blocks)
        if lacking <= 0:
            return
        self._spare.pop(copy, None)  # not to give up what is to grow
        try:
            while True:
                try:
                    copy.blocks += self._buffer.take(lacking)
                    break
                except OutOfMemory:
                    if not self._spare:
                        raise
                    self.drop(next(iter(self._spare)))
            if copy.needed:
                self.needed_blocks += lacking
        finally:
            self._settle_spare(copy)

    def out_done(self, copy: HostCopy) -> bool:
        """Whether everything that was started is over.

        Raises:
            CopyFailed: one of the copies failed; the copy is dropped.
        """
        while copy._out:
            if not self._copier.done(copy._out[0][0]):
                return False
            self._settle_out(copy)
        return True

    def wait_out(self, copy: HostCopy) -> None:
        """Waits for what was started. Raises as `out_done`."""
        while copy._out:
            self._settle_out(copy)

    def _settle_out(self, copy: HostCopy) -> None:
        ticket, count_bytes, begin = copy._out.pop(0)
        try:
            self._copier.wait(ticket)
        except RuntimeError as error:
            self.drop(copy)
            raise CopyFailed(str(error)) from error
        self.out_bytes += count_bytes
        self._observe_copy(count_bytes, self._events.clock() - begin)
        self._events.add("offload", count_bytes, "to host memory", begin, copy.request_id)

    def keep_only(self, copy: HostCopy) -> None:
        """The request's slot is to go: this is the only copy from now on."""
        if not copy.needed:
            copy.needed = True
            self._spare.pop(copy, None)
            self.needed_blocks += len(copy.blocks)

    # In.

    def copy_in(self, copy: HostCopy, slot: int, first_tile: int) -> None:
        """Starts copying the tiles from `first_tile` on, if there are any, to a slot where they are
        mapped."""
        blocks = copy.blocks[first_tile : self.blocks_for(copy.tokens)]
        if not blocks:
            self._is_in(copy)
            return
        begin = self._events.clock()
        ticket = self._copier.fetch(self._kv, slot, first_tile, self._buffer, blocks)
        copy._in = (ticket, len(blocks) * self.block_bytes, begin)

    def in_done(self, copy: HostCopy) -> bool:
        """Whether the request's KV is in its slot.

        Raises:
            CopyFailed: it could not be copied; the copy is dropped.
        """
        if copy._in is not None:
            if not self._copier.done(copy._in[0]):
                return False
            self._settle_in(copy)
        return True

    def _settle_in(self, copy: HostCopy) -> None:
        assert copy._in is not None
        ticket, count_bytes, begin = copy._in
        copy._in = None
        try:
            self._copier.wait(ticket)
        except RuntimeError as error:
            self.drop(copy)
            raise CopyFailed(str(error)) from error
        self.in_bytes += count_bytes
        self._observe_copy(count_bytes, self._events.clock() - begin)
        self._events.add("fetch", count_bytes, "to be decoded", begin, copy.request_id)
        self._is_in(copy)

    def _is_in(self, copy: HostCopy) -> None:
        copy.needed = False
        self.needed_blocks -= len(copy.blocks)
        self._settle_spare(copy)

    def wait_any(self, copies: Sequence[HostCopy]) -> None:
        """Waits for the oldest copy on its way among these. Its failure, if any, is reported by
        `out_done` and `in_done`."""
        for copy in copies:
            ticket = copy._out[0][0] if copy._out else copy._in[0] if copy._in else None
            if ticket is not None:
                with contextlib.suppress(RuntimeError):
                    self._copier.wait(ticket)
                return

    # Ends.

    def drop(self, copy: HostCopy) -> None:
        """Gives a copy up, after what is on its way is over."""
        tickets = [ticket for ticket, _, _ in copy._out]
        if copy._in is not None:
            tickets.append(copy._in[0])
        for ticket in tickets:
            with contextlib.suppress(RuntimeError):  # nobody will read it
                self._copier.wait(ticket)
        copy._out.clear()
        copy._in = None
        self._spare.pop(copy, None)
        if copy.needed:
            self.needed_blocks -= len(copy.blocks)
            copy.needed = False
        if copy.blocks:
            self._buffer.give_back(copy.blocks)
        copy.blocks = []
        copy.tokens = 0

    def _settle_spare(self, copy: HostCopy) -> None:
        if copy.blocks and not copy.needed:
            self._spare[copy] = None

    def resize(self, limit_bytes: int) -> None:
        """Sets the limit; copies of requests that have a slot are given up where need be.

        Raises:
            OutOfMemory: what is needed does not fit; the old limit stays.
        """
        while True:
            try:
                self._buffer.resize(limit_bytes)
                break
            except OutOfMemory:
                if not self._spare:
                    raise
                self.drop(next(iter(self._spare)))
        self.limit_bytes = limit_bytes

    def trim(self) -> None:
        """Gives copies of requests that have a slot up, and unused blocks back to the system."""
        for copy in list(self._spare):
            self.drop(copy)
        self._buffer.trim()

    def usage(self) -> dict[str, int]:
        """Bytes of the buffer: limit, used, free, peak_used, physical."""
        return self._buffer.usage()

    def close(self) -> None:
        """Ends the copies, and what is done ahead of them."""
        self._copier.close()
        self._buffer.close()
