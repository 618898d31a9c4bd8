"""The KV caches of several devices, as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ellm_jax._native import KvCache, KvGroup, KvLayout, OutOfMemory
from ellm_jax.memory.lockstep.pool import LockstepPool
from ellm_jax.memory.lockstep.together import all_or_none, on_every, reported


class LockstepKv:
    """As the native `KvCache`. A request has the same slot on every device, with as much of it
    mapped, each device holding its heads.

    Attributes:
        members: the caches, one per device.
        id: of the group, for custom calls: on each device it means that device's own.
        layout: of each of them.
    """

    def __init__(
        self,
        pool: LockstepPool,
        layout: KvLayout,
        device_ordinals: Sequence[int],
    ):
        """Reserves addresses on every device; maps nothing.

        Args:
            pool: of the devices.
            layout: of one device's heads.
            device_ordinals: the devices, in the order of the pool's members, as XLA counts them.
        """
        self._pool = pool
        self.members = tuple(KvCache(member, layout) for member in pool.members)
        self._group = KvGroup(self.members, device_ordinals)
        self.id = self._group.id
        self.layout = layout
        self._asked: dict[int, set[int]] = {}  # chunks by slot that somebody has asked for

    # Slots.

    def take_slot(self, tokens: int) -> int:
        """A slot for about `tokens` tokens. Raises `OutOfMemory` when every slot is in use."""
        return self._take(lambda lead: lead.take_slot(tokens))

    def take_empty_slot(self) -> int:
        """A slot with nothing mapped; raises as `take_slot`."""
        return self._take(lambda lead: lead.take_empty_slot())

    def _take(self, choose: Callable[[KvCache], int]) -> int:
        """The slot that the first device chooses, on all of them. Where another device cannot have
        it because it is broken there, the next choice."""
        lead = self.members[0]
        unfit: list[int] = []
        try:
            while True:
                slot = choose(lead)
                try:
                    self._follow(slot)
                    return slot
                except RuntimeError as error:
                    unfit.append(slot)
                    if len(unfit) == self.layout.num_slots:
                        raise OutOfMemory(f"no slot is sound on every device: {error}") from error
        finally:
            for slot in unfit:
                with reported(0):
                    lead.release(slot)

    def _follow(self, slot: int) -> None:
        """Takes a slot that the first device has on the others too, and unmaps what not all of them
        have mapped there."""

        def take(index: int, kv: KvCache) -> None:
            if index:
                kv.take(slot)

        def release(index: int, kv: KvCache, _: None) -> None:
            if index:
                kv.release(slot)

        all_or_none(self.members, take, release)
        try:
            self._level(slot)
        except RuntimeError:
            for index, kv in enumerate(self.members):
                with reported(index):
                    release(index, kv, None)
            raise

    def _level(self, slot: int) -> None:
        """Unmaps what a slot has mapped on some devices only."""
        common = self.mapped_tokens(slot)
        on_every(self.members, lambda _, kv: kv.truncate(slot, common))

    def release(self, slot: int) -> None:
        """Ends a request's hold on every device, even where one raises."""
        self._forget(slot)
        on_every(self.members, lambda _, kv: kv.release(slot))

    def release_async(self, slot: int) -> None:
        """As `release`; the caches' own threads do the unmapping."""
        self._forget(slot)
        on_every(self.members, lambda _, kv: kv.release_async(slot))

    def _forget(self, slot: int) -> None:
        self._pool.forget(self._asked.pop(slot, ()))

    # What is mapped.

    def extend(self, slots: Sequence[int], tokens: Sequence[int]) -> None:
        """Maps until slots[i] holds tokens[i] tokens, on all devices or none. Where one refuses,
        the others unmap what they have more than it; if that fails, it is logged, and the slot
        holds more there until it ends or grows."""
        try:
            for kv in self.members:
                kv.extend(slots, tokens)
        except BaseException:
            self._level_all(slots)
            raise

    def _level_all(self, slots: Sequence[int]) -> None:
        for slot in slots:
            if self.slot_state(slot) != "broken":
                with reported(0):
                    self._level(slot)

    def premap(self, slots: Sequence[int], tokens: Sequence[int]) -> int:
        """Takes chunks ahead of `extend` and has them mapped; returns how many of them. Where the
        devices cannot have equally many, what was not yet mapped is given back, and it is 0."""
        before = [self.mapped_tokens(slot) for slot in slots]
        taken = [kv.premap(slots, tokens) for kv in self.members]
        if len(set(taken)) == 1:
            return taken[0]
        for slot, common in zip(slots, before, strict=True):
            for index, kv in enumerate(self.members):
                with reported(index):
                    kv.truncate(slot, common)
        return 0

    def map_shared(self, slot: int, ids: Sequence[int]) -> None:
        """Maps these chunks as the first ones of a slot with nothing mapped; all or nothing."""
        own = self._pool.own_ids(ids)
        all_or_none(
            self.members,
            lambda index, kv: kv.map_shared(slot, own[index]),
            lambda _, kv, __: kv.truncate(slot, 0),
        )

    def slot_chunks(self, slot: int, begin: int, end: int) -> list[int]:
        """Ids of the mapped chunks [begin, end) of a slot."""
        ids = self._pool.know([kv.slot_chunks(slot, begin, end) for kv in self.members])
        self._asked.setdefault(slot, set()).update(ids)
        return ids

    def truncate(self, slot: int, tokens: int) -> None:
        """Unmaps what `tokens` tokens do not need, on every device, even where one raises."""
        on_every(self.members, lambda _, kv: kv.truncate(slot, tokens))

    def settle(self) -> None:
        """Waits until the caches' own threads have nothing left to do."""
        on_every(self.members, lambda _, kv: kv.settle())

    def reclaim(self, count_bytes: int) -> int:
        """Unmaps available slots until so many bytes are back on each device; returns the least
        that one gave."""
        return min(on_every(self.members, lambda _, kv: kv.reclaim(count_bytes)))

    def trim_available(self) -> int:
        """Unmaps all available slots; returns the least bytes that one device gave."""
        return min(on_every(self.members, lambda _, kv: kv.trim_available()))

    def close(self) -> None:
        """Unmaps everything on every device; may be repeated."""
        on_every(self.members, lambda _, kv: kv.close())

    # What others look at.

    def mapped_tokens(self, slot: int) -> int:
        """Tokens that fit what is mapped on every device; 0 for a slot broken on one."""
        return min(kv.mapped_tokens(slot) for kv in self.members)

    def mapped_bytes(self, slot: int) -> int:
        """Bytes that are mapped on every device."""
        return min(kv.mapped_bytes(slot) for kv in self.members)

    def slot_state(self, slot: int) -> str:
        """The state on the first device, but "broken" or "dying" where it is so on any."""
        states = [kv.slot_state(slot) for kv in self.members]
        return next((state for state in ("broken", "dying") if state in states), states[0])

    def check_step(self, metadata: Any) -> None:
        """Raises unless everything that a step with this metadata touches is mapped everywhere."""
        for kv in self.members:
            kv.check_step(metadata)

    def stats(self) -> dict[str, int]:
        """Of the first device; what is broken, and the driver's calls, are those of all."""
        lead, *others = (kv.stats() for kv in self.members)
        summed = {name for name in lead if name.startswith("broken") or "map_" in name}
        return {
            name: count + sum(other[name] for other in others if name in summed)
            for name, count in lead.items()
        }
