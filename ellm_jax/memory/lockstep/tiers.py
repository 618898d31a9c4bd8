"""Host memory, copies and workspaces of several devices, as those of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ellm_jax._native import Arena, Copier, HostBuffer
from ellm_jax.memory.lockstep.kv import LockstepKv
from ellm_jax.memory.lockstep.together import all_or_none, on_every


class LockstepBuffer:
    """As the native `HostBuffer`: a block holds one device's heads of a tile, so a tile has one
    block per device. Sizes are those of each device. A block goes by its number on the first
    device."""

    def __init__(self, members: Sequence[HostBuffer]):
        """Takes buffers with equal blocks and limits, from which nothing has been taken."""
        self.members = tuple(members)
        self._blocks: dict[int, tuple[int, ...]] = {}

    def take(self, n: int, /) -> list[int]:
        """`n` blocks on every device, or none on any."""
        own = all_or_none(
            self.members,
            lambda _, buffer: buffer.take(n),
            lambda _, buffer, blocks: buffer.give_back(blocks),
        )
        self._blocks.update((blocks[0], blocks) for blocks in zip(*own, strict=True))
        return list(own[0])

    def give_back(self, ids: Sequence[int], /) -> None:
        """Gives blocks back."""
        own = self.own_blocks(ids)
        on_every(self.members, lambda index, buffer: buffer.give_back(own[index]))
        for block in ids:
            del self._blocks[block]

    def own_blocks(self, ids: Sequence[int]) -> list[list[int]]:
        """The numbers of the same blocks on each device."""
        known = [self._blocks[block] for block in ids]
        return [[blocks[index] for blocks in known] for index in range(len(self.members))]

    def usage(self) -> dict[str, int]:
        """The picture of the device that has least free; all have the same limit."""
        return min((buffer.usage() for buffer in self.members), key=lambda usage: usage["free"])

    def resize(self, limit_bytes: int, /) -> None:
        """Sets the limit on every device, or on none."""
        before = self.members[0].usage()["limit"]
        all_or_none(
            self.members,
            lambda _, buffer: buffer.resize(limit_bytes),
            lambda _, buffer, __: buffer.resize(before),
        )

    def trim(self) -> int:
        """Gives unused blocks to the system; returns the least bytes that one device gave."""
        return min(on_every(self.members, lambda _, buffer: buffer.trim()))

    def close(self) -> None:
        """Ends the threads that work ahead."""
        on_every(self.members, lambda _, buffer: buffer.close())


class LockstepCopier:
    """As the native `Copier`: a copy is one per device, each on its own thread."""

    def __init__(self, members: Sequence[Copier]):
        """Takes a copier per device."""
        self.members = tuple(members)
        self._tickets: dict[int, tuple[int, ...]] = {}  # of copies that nobody has seen the end of
        self._last = 0

    def offload(
        self,
        kv: LockstepKv,
        slot: int,
        first_tile: int,
        buffer: LockstepBuffer,
        blocks: Sequence[int],
        /,
    ) -> int:
        """Copies chunks of a slot to blocks; returns a ticket."""
        own = buffer.own_blocks(blocks)
        return self._submit(
            lambda index, copier: copier.offload(
                kv.members[index], slot, first_tile, buffer.members[index], own[index]
            )
        )

    def fetch(
        self,
        kv: LockstepKv,
        slot: int,
        first_tile: int,
        buffer: LockstepBuffer,
        blocks: Sequence[int],
        /,
    ) -> int:
        """The reverse of `offload`."""
        own = buffer.own_blocks(blocks)
        return self._submit(
            lambda index, copier: copier.fetch(
                kv.members[index], slot, first_tile, buffer.members[index], own[index]
            )
        )

    def _submit(self, start: Callable[[int, Copier], int]) -> int:
        tickets = all_or_none(self.members, start, lambda _, copier, ticket: copier.wait(ticket))
        self._last += 1
        self._tickets[self._last] = tuple(tickets)
        return self._last

    def done(self, ticket: int, /) -> bool:
        """Whether the copy is over on every device, well or not."""
        own = self._tickets.get(ticket, ())
        return all(copier.done(each) for copier, each in zip(self.members, own, strict=False))

    def wait(self, ticket: int, /) -> None:
        """Returns when the copy is over on every device. Raises `RuntimeError` if it failed on
        one."""
        own = self._tickets.get(ticket)
        if own is not None:
            on_every(self.members, lambda index, copier: copier.wait(own[index]))
            del self._tickets[ticket]  # it went well, and nobody learns otherwise by asking again

    def close(self) -> None:
        """Ends the threads."""
        on_every(self.members, lambda _, copier: copier.close())


class LockstepArena:
    """What the ledger asks of the native `Arena`, of one per device."""

    def __init__(self, members: Sequence[Arena]):
        """Takes an arena per device."""
        self.members = tuple(members)

    def collect(self, count_bytes: int) -> int:
        """Unmaps inactive chunks until so many bytes are back on each device, or all of them where
        that is what the one with fewest has; returns the least that one gave."""
        everything = count_bytes >= self.usage()["inactive"]

        def collect(_: int, arena: Arena) -> int:
            return arena.collect(arena.usage()["inactive"] if everything else count_bytes)

        return min(on_every(self.members, collect))

    def usage(self) -> dict[str, int]:
        """The picture of the device that keeps least for the next step."""
        return min((arena.usage() for arena in self.members), key=lambda usage: usage["inactive"])
