"""The pools of several devices, as one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ellm_jax._native import Pool
from ellm_jax.memory.lockstep.together import all_or_none, on_every

_SAME = ("limit", "weights", "workspace")
"""What no driver call has a part in, so that it is the same on all devices at any time."""


class LockstepPool:
    """As the native `Pool`. Sizes are those of each device.

    A chunk goes by the id that it has on the first device.

    Attributes:
        members: the pools, one per device.
        chunk_bytes: the size of their chunks.
    """

    def __init__(self, members: Sequence[Pool]):
        """Takes pools with equal chunks and limits, from which nothing has been taken."""
        self.members = tuple(members)
        self.chunk_bytes = members[0].chunk_bytes
        self._ids: dict[int, tuple[int, ...]] = {}
        self._cached: set[int] = set()

    def usage(self) -> dict[str, int]:
        """The picture of the device that has least to give. The owners add up to the limit."""
        pictures = (pool.usage() for pool in self.members)
        return min(pictures, key=lambda usage: (usage["free"], usage["obtainable"]))

    def check(self) -> None:
        """Asserts that the devices agree. For the planning thread.

        Raises:
            AssertionError: they do not; with the numbers.
        """
        pictures = [pool.usage() for pool in self.members]
        for name in _SAME:
            sizes = [usage[name] for usage in pictures]
            assert len(set(sizes)) == 1, f"devices disagree about {name}: {sizes}"

    def reset_peaks(self) -> None:
        """Starts the peaks anew."""
        on_every(self.members, lambda _, pool: pool.reset_peaks())

    def reserve(self, owner: str, count_bytes: int) -> None:
        """On every device, or on none."""
        all_or_none(
            self.members,
            lambda _, pool: pool.reserve(owner, count_bytes),
            lambda _, pool, __: pool.give_back(owner, count_bytes),
        )

    def give_back(self, owner: str, count_bytes: int) -> None:
        """Undoes `reserve`, in any portions."""
        on_every(self.members, lambda _, pool: pool.give_back(owner, count_bytes))

    def trim(self, keep_bytes: int = 0) -> int:
        """Hands backed free memory to the system on every device; the least bytes of one."""
        return min(on_every(self.members, lambda _, pool: pool.trim(keep_bytes)))

    def resize(self, limit_bytes: int) -> None:
        """Sets the limit on every device, or on none."""
        before = self.members[0].usage()["limit"]
        all_or_none(
            self.members,
            lambda _, pool: pool.resize(limit_bytes),
            lambda _, pool, __: pool.resize(before),
        )

    def synchronize(self) -> None:
        """Waits until every device has done what was started on it, those after one that fails
        too."""
        on_every(self.members, lambda _, pool: pool.synchronize())

    # Chunks.

    def cache(self, ids: Sequence[int]) -> None:
        """The prefix cache takes one reference to each chunk, or to none."""
        own = self.own_ids(ids)
        all_or_none(
            self.members,
            lambda index, pool: pool.cache(own[index]),
            lambda index, pool, _: pool.uncache(own[index]),
        )
        self._cached.update(ids)

    def uncache(self, ids: Sequence[int]) -> int:
        """The prefix cache gives the chunks up; the least bytes that one device has free by it."""
        own = self.own_ids(ids)
        freed = on_every(self.members, lambda index, pool: pool.uncache(own[index]))
        self._cached.difference_update(ids)
        self.forget(ids)
        return min(freed)

    def know(self, own: Sequence[Sequence[int]]) -> list[int]:
        """Takes in the ids of chunks that belong together, a list per device, and gives the ids
        that they go by."""
        for together in zip(*own, strict=True):
            self._ids[together[0]] = together
        return list(own[0])

    def own_ids(self, ids: Sequence[int]) -> list[list[int]]:
        """The ids of the same chunks on each device.

        Raises:
            ValueError: a chunk that is neither cached nor in an active slot.
        """
        try:
            known = [self._ids[chunk] for chunk in ids]
        except KeyError as error:
            raise ValueError(
                f"chunk {error} is neither cached nor known of any active slot; ask its slot first"
            ) from error
        return [[together[index] for together in known] for index in range(len(self.members))]

    def forget(self, ids: Iterable[int]) -> None:
        """The slot or the cache that knew these chunks lets go of them."""
        for chunk in ids:
            if chunk not in self._cached:
                self._ids.pop(chunk, None)
