"""The memory of several devices driven as one: all of them do what was asked, or none does."""

import logging
import random

import pytest

import ellm_jax.sim.world
from ellm_jax._native import Copier, HostBuffer, KvLayout, OutOfMemory, Pool
from ellm_jax.memory.lockstep import LockstepBuffer, LockstepCopier, LockstepKv, LockstepPool
from ellm_jax.runtime.batch import Span, StepLayout
from ellm_jax.runtime.shapes import StepShape
from ellm_jax.sim import invariants
from ellm_jax.sim.fuzz import run_seed
from ellm_jax.sim.script import write_script

LAYOUT = KvLayout.choose(4, 2, 64, 2, 256, 6)
CHUNK = LAYOUT.chunk_bytes
TILE = LAYOUT.tile_tokens
OWNERS = ("free", "kv", "cache", "activation", "weights", "workspace")


@pytest.fixture(autouse=True)
def quiet():
    """Warnings about the faults that are injected say nothing."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


class SimulatedPools(LockstepPool):
    """Pools without memory. Faults hit all of them, or the last one alone.

    `check` also looks at what is only the same on all devices while nothing has failed.
    """

    devices = 2
    hit_all = False

    def __init__(self, members):
        super().__init__(members)
        self.sound = True

    @classmethod
    def simulated(cls, chunk_bytes, limit_bytes):
        return cls([Pool.simulated(chunk_bytes, limit_bytes) for _ in range(cls.devices)])

    def inject_faults(self, seed, rate):
        self.sound &= not rate
        for index, pool in enumerate(self.members):
            if self.hit_all or index == len(self.members) - 1:
                pool.inject_faults(seed + index, rate)

    def check(self):
        super().check()
        check_each(self)
        if self.sound:
            pictures = [pool.usage() for pool in self.members]
            assert len({(p["kv"], p["activation"]) for p in pictures}) == 1, pictures


class SettledKv(LockstepKv):
    """One whose threads are waited for, so that a world goes the same way each time."""

    def __init__(self, pool, layout):
        super().__init__(pool, layout, range(len(pool.members)))

    def premap(self, slots, tokens):
        taken = super().premap(slots, tokens)
        self.settle()
        return taken

    def release_async(self, slot):
        super().release_async(slot)
        self.settle()


class FreeKv(LockstepKv):
    """One that is not waited for."""

    def __init__(self, pool, layout):
        super().__init__(pool, layout, range(len(pool.members)))


def check_each(pool):
    for member in pool.members:
        usage = member.usage()
        assert sum(usage[owner] for owner in OWNERS) == usage["limit"], usage
        assert usage["physical"] <= usage["limit"], usage


def check_chunks(world, slots, usage):
    """As the simulator's own check, on every device: KV is what its slots hold, and that is what
    the ledger counts, but where a mapping ahead has failed on some device."""
    ledger, kv, pool = world.ledger, world.kv, world.pool
    tile = ledger.tile_tokens
    for slot in slots:
        chunks = {-(-member.mapped_tokens(slot) // tile) for member in kv.members}
        counted = ledger.taken_bytes(slot) // ledger.chunk_bytes
        failed_ahead = slot in ledger._premapped and min(chunks) < counted
        assert chunks == {counted} or failed_ahead, f"slot {slot}: {chunks}, counted {counted}"
    idle = ledger.prefix.evictable if ledger.prefix is not None else 0
    for index, (member, one) in enumerate(zip(kv.members, pool.members, strict=True)):
        used = set()
        for slot in slots:
            used.update(member.slot_chunks(slot, 0, -(-member.mapped_tokens(slot) // tile)))
        own = one.usage()
        assert own["kv"] == len(used) * ledger.chunk_bytes, f"device {index}: {own}"
        assert own["cache"] == idle * ledger.chunk_bytes, f"device {index}: {own}"


@pytest.mark.parametrize(
    ("devices", "hit_all", "settle", "seeds"),
    [
        (2, False, True, range(0, 60)),
        (2, True, True, range(60, 100)),
        (3, True, True, range(100, 120)),
        (2, False, False, range(400, 420)),
        (3, True, False, range(420, 430)),
    ],
)
def test_random_worlds_on_several_devices(devices, hit_all, settle, seeds, monkeypatch):
    """The simulator's worlds, with the checks of each step, over the pools of several devices."""
    monkeypatch.setattr(SimulatedPools, "devices", devices)
    monkeypatch.setattr(SimulatedPools, "hit_all", hit_all)
    monkeypatch.setattr(ellm_jax.sim.world, "Pool", SimulatedPools)
    monkeypatch.setattr(ellm_jax.sim.world, "SettledKvCache", SettledKv)
    monkeypatch.setattr(ellm_jax.sim.world, "KvCache", FreeKv)
    monkeypatch.setattr(invariants, "_check_chunks", check_chunks)
    for seed in seeds:
        run_seed(seed, settle=settle)


def test_without_faults_several_devices_do_as_one_does(monkeypatch):
    """Worlds in which no driver call fails give the same trace, line for line."""
    seeds = [
        seed
        for seed in range(500, 540)
        if all(happening.kind != "driver_faults" for happening in write_script(seed).happenings)
    ]
    assert len(seeds) > 20
    alone = [run_seed(seed) for seed in seeds]
    monkeypatch.setattr(ellm_jax.sim.world, "Pool", SimulatedPools)
    monkeypatch.setattr(ellm_jax.sim.world, "SettledKvCache", SettledKv)
    assert [run_seed(seed) for seed in seeds] == alone


def make(chunks=24, devices=2):
    pool = LockstepPool([Pool.simulated(CHUNK, chunks * CHUNK + 100) for _ in range(devices)])
    return pool, LockstepKv(pool, LAYOUT, range(devices))


def mapped(kv, slot):
    return [member.mapped_tokens(slot) for member in kv.members]


def owned(pool, owner="kv"):
    return [member.usage()[owner] for member in pool.members]


def no_more_faults(pool):
    """Puts off a call that was told to fail and has not come."""
    pool.fail_call(1 << 40)


@pytest.mark.parametrize("failing", range(2))
def test_extending_is_for_all_devices_or_none(failing):
    """The n-th driver call on one device fails, for each n: nobody has more than before, and the
    next try succeeds."""
    failures = 0
    for n in range(1, 12):
        pool, kv = make()
        one, two = kv.take_slot(0), kv.take_slot(0)
        kv.extend([one, two], [2 * TILE, TILE])
        before, calls = owned(pool), pool.members[failing].driver_calls
        pool.members[failing].fail_call(n)
        try:
            kv.extend([two, one], [3 * TILE, 5 * TILE])
        except RuntimeError:
            failures += 1
            assert owned(pool) == before, f"call {n}"
            assert mapped(kv, one) == [2 * TILE] * 2
            assert mapped(kv, two) == [TILE] * 2
        else:
            assert pool.members[failing].driver_calls - calls < n, "the fault was swallowed"
        no_more_faults(pool.members[failing])
        kv.extend([one, two], [5 * TILE, 3 * TILE])
        assert mapped(kv, one) == [5 * TILE] * 2
        assert mapped(kv, two) == [3 * TILE] * 2
        check_each(pool)
        kv.close()
        assert owned(pool) == [0, 0]
    assert failures >= 2, "no call failed"


def test_a_pool_that_is_short_on_one_device_is_short_on_all():
    pool, kv = make(chunks=10)
    pool.members[1].reserve("activation", 6 * CHUNK)  # as the kernels of one device might
    slot = kv.take_slot(0)
    with pytest.raises(OutOfMemory):
        kv.extend([slot], [6 * TILE])
    assert owned(pool) == [0, 0]
    assert pool.usage()["free"] == 4 * CHUNK + 100
    with pytest.raises(OutOfMemory):
        pool.reserve("weights", 5 * CHUNK)
    assert owned(pool, "weights") == [0, 0]
    # Ahead of a step each takes what it can, and they keep what both can.
    assert kv.premap([slot], [6 * TILE]) == 0
    kv.settle()
    assert mapped(kv, slot) == [0, 0]
    assert owned(pool) == [0, 0]
    assert kv.premap([slot], [4 * TILE]) == 4
    kv.extend([slot], [4 * TILE])
    assert mapped(kv, slot) == [4 * TILE] * 2
    with pytest.raises(OutOfMemory):
        pool.resize(7 * CHUNK)
    assert owned(pool, "limit") == [10 * CHUNK + 100] * 2
    kv.close()


def test_all_devices_have_the_slot_that_one_chooses():
    """Also where it is being unmapped on one of them, holds more there, or is broken there."""
    pool, kv = make()
    slots = [kv.take_slot(0) for _ in range(3)]
    kv.extend(slots, [3 * TILE] * 3)
    for slot in slots:
        kv.release(slot)
    # One device unmaps a slot on its own, as it would when it alone is short.
    kv.members[1].reclaim(2 * CHUNK)
    again = kv.take_slot(3 * TILE)
    assert kv.slot_state(again) == "active"
    assert len(set(mapped(kv, again))) == 1
    assert owned(pool)[0] == owned(pool)[1]
    empty = kv.take_empty_slot()
    assert mapped(kv, empty) == [0, 0]

    broken = kv.take_slot(0)
    kv.extend([broken], [2 * TILE])
    member = pool.members[1]
    member.inject_faults(1, 1.0)
    with pytest.raises(RuntimeError):
        kv.truncate(broken, 0)
    assert kv.slot_state(broken) == "broken"
    assert kv.mapped_tokens(broken) == 0
    with pytest.raises(RuntimeError):
        kv.release(broken)
    # The first device would have it; the other cannot, so it is another one.
    others = [kv.take_slot(0) for _ in range(3)]
    assert broken not in others
    with pytest.raises(OutOfMemory):
        kv.take_slot(0)
    member.inject_faults(0, 0.0)
    assert kv.take_slot(0) == broken
    assert kv.stats()["broken_slots"] == 0
    for slot in (again, empty, broken, *others):
        kv.release(slot)
    kv.trim_available()
    assert owned(pool, "free") == [24 * CHUNK + 100] * 2


def test_shared_chunks_are_known_by_one_name():
    pool, kv = make()
    # From here on the same chunk has different ids on the two devices.
    own = kv.members[1].take_slot(0)
    kv.members[1].extend([own], [TILE])
    first = kv.take_slot(0)
    kv.extend([first], [3 * TILE])
    ids = kv.slot_chunks(first, 0, 2)
    assert kv.members[0].slot_chunks(first, 0, 2) == ids
    assert kv.members[1].slot_chunks(first, 0, 2) != ids
    pool.cache(ids)
    second = kv.take_empty_slot()
    kv.map_shared(second, ids)
    assert kv.slot_chunks(second, 0, 2) == ids
    assert mapped(kv, second) == [2 * TILE] * 2
    kv.release(first)
    kv.release(second)
    assert owned(pool, "cache") == [2 * CHUNK] * 2
    assert pool.uncache(ids) in (0, 2 * CHUNK)
    assert owned(pool, "cache") == [0, 0]
    with pytest.raises(ValueError, match="neither cached"):
        pool.cache(ids)
    assert not pool._ids
    kv.members[1].release(own)
    kv.close()


@pytest.mark.parametrize("n", range(1, 4))
def test_mapping_shared_chunks_that_fails_on_one_device_leaves_nothing(n):
    pool, kv = make()
    first = kv.take_slot(0)
    kv.extend([first], [3 * TILE])
    ids = kv.slot_chunks(first, 0, 3)
    pool.cache(ids)
    second = kv.take_empty_slot()
    pool.members[1].fail_call(n)
    try:
        kv.map_shared(second, ids)
    except RuntimeError:
        assert mapped(kv, second) == [0, 0]
    else:
        assert n > 1, "the fault was swallowed"
        assert mapped(kv, second) == [3 * TILE] * 2
    no_more_faults(pool.members[1])
    kv.release(second)
    kv.release(first)
    pool.uncache(ids)
    check_each(pool)
    kv.close()


def test_a_step_is_checked_on_every_device():
    _, kv = make()
    slot = kv.take_slot(0)
    kv.extend([slot], [2 * TILE])
    layout = StepLayout(StepShape(64, 8), LAYOUT.num_slots)
    packed = layout.pack(kv.id, [Span(slot, 2 * TILE - 3, [1, 2, 3], True)])
    kv.check_step(packed)
    for short in kv.members:
        short.truncate(slot, TILE)
        with pytest.raises(RuntimeError, match=f"slot {slot} is to hold .* only {TILE} tokens"):
            kv.check_step(packed)
        short.extend([slot], [2 * TILE])
        kv.check_step(packed)
    with pytest.raises(ValueError, match="names slot"):
        kv.check_step(layout.pack(kv.id, [Span(LAYOUT.num_slots, 0, [1], True)]))
    kv.close()


class Waiting:
    """A pool that is waited for."""

    chunk_bytes = CHUNK

    def __init__(self, error=None):
        self.error = error
        self.waits = 0

    def synchronize(self):
        self.waits += 1
        if self.error:
            raise RuntimeError(self.error)


def test_every_device_is_waited_for_also_after_one_that_fails():
    members = [Waiting("the first"), Waiting(), Waiting("the last")]
    with pytest.raises(RuntimeError, match="the first"):
        LockstepPool(members).synchronize()
    assert [member.waits for member in members] == [1, 1, 1]


def test_host_blocks_are_for_all_devices_or_none():
    buffer = LockstepBuffer([HostBuffer(CHUNK, 4 * CHUNK), HostBuffer(CHUNK, 3 * CHUNK)])
    [odd] = buffer.members[1].take(1)  # so that the numbers differ
    blocks = buffer.take(2)
    assert buffer.usage()["free"] == 0
    assert buffer.own_blocks(blocks)[0] != buffer.own_blocks(blocks)[1]
    with pytest.raises(OutOfMemory):
        buffer.take(1)
    assert [member.usage()["used"] // CHUNK for member in buffer.members] == [2, 3]
    with pytest.raises(OutOfMemory):
        buffer.resize(2 * CHUNK)
    assert buffer.members[0].usage()["limit"] == 4 * CHUNK
    buffer.give_back(blocks)
    for member in buffer.members:
        member.prepare_ahead(member.usage()["limit"])
    buffer.close()
    buffer.members[1].give_back([odd])
    assert buffer.trim() >= 2 * CHUNK
    assert [member.usage()["physical"] for member in buffer.members] == [0, 0]


def test_copies_go_round_each_device_and_fail_for_all_where_one_fails():
    seed = 3
    rng = random.Random(seed)
    layout = KvLayout.choose(2, 2, 64, 4, 512, 3)
    pool = LockstepPool([Pool(layout.chunk_bytes, 16 * layout.chunk_bytes) for _ in range(2)])
    kv = LockstepKv(pool, layout, [0, 1])
    limit = 8 * layout.chunk_bytes
    buffer = LockstepBuffer([HostBuffer(layout.chunk_bytes, limit) for _ in range(2)])
    copier = LockstepCopier([Copier(), Copier()])
    tile = layout.tile_tokens
    slot = kv.take_slot(0)
    kv.extend([slot], [3 * tile])
    blocks = buffer.take(3)
    ticket = copier.offload(kv, slot, 0, buffer, blocks)
    copier.wait(ticket)
    assert copier.done(ticket)
    copier.wait(ticket)
    assert not copier._tickets
    # One device's slot is too short when its turn comes.
    kv.members[1].truncate(slot, tile * rng.randint(0, 2))
    ticket = copier.fetch(kv, slot, 0, buffer, blocks)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            copier.wait(ticket)
    assert copier.done(ticket)
    buffer.give_back(blocks)
    copier.close()
    kv.close()
