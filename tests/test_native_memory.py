"""The native pool and KV cache as Python sees them, over a driver without memory."""

import threading

import pytest

from ellm_jax._native import KvCache, KvLayout, OutOfMemory, Pool

LAYOUT = KvLayout.choose(
    layers=2, kv_heads=2, head_dim=64, element_bytes=2, max_tokens=1024, num_slots=4
)
CHUNK = LAYOUT.chunk_bytes
TILE = LAYOUT.tile_tokens


def make(chunks: int = 16) -> tuple[Pool, KvCache]:
    pool = Pool.simulated(CHUNK, chunks * CHUNK)
    return pool, KvCache(pool, LAYOUT)


def request(kv: KvCache, chunks: int) -> int:
    slot = kv.take_empty_slot()
    kv.extend([slot], [chunks * TILE])
    return slot


def owned(pool: Pool) -> dict[str, int]:
    """Chunks by owner, after a look at the sum."""
    usage = pool.usage()
    owners = ("kv", "cache", "activation", "weights", "workspace")
    assert usage["free"] + sum(usage[owner] for owner in owners) == usage["limit"]
    assert usage["obtainable"] + usage["available"] == usage["free"]
    assert usage["physical"] <= usage["limit"]
    return {owner: usage[owner] // CHUNK for owner in ("kv", "cache", "available")}


def test_a_simulated_pool_counts_without_memory() -> None:
    pool = Pool.simulated(CHUNK, 1 << 50)  # A pebibyte.
    kv = KvCache(pool, LAYOUT)
    slot = kv.take_slot(1)
    kv.extend([slot], [1024])
    assert pool.usage()["kv"] == LAYOUT.chunks_for(1024) * CHUNK
    assert pool.usage()["physical"] == pool.usage()["kv"]
    assert pool.driver_calls == 1 + LAYOUT.chunks_for(1024) + 1
    kv.close()
    assert pool.usage()["free"] == 1 << 50


def test_faults_can_be_had_in_simulated_pools_only() -> None:
    pool = Pool(CHUNK, 4 * CHUNK)
    for call in (lambda: pool.inject_faults(1, 0.5), lambda: pool.fail_call(1)):
        with pytest.raises(ValueError, match=r"Pool\.simulated"):
            call()
    with pytest.raises(ValueError, match=r"Pool\.simulated"):
        _ = pool.driver_calls
    simulated = Pool.simulated(CHUNK, 4 * CHUNK)
    with pytest.raises(ValueError, match="from 0 to 1"):
        simulated.inject_faults(1, 1.5)
    with pytest.raises(ValueError, match="next call"):
        simulated.fail_call(0)
    with pytest.raises(ValueError, match="not be negative"):
        simulated.fail_call(-1)


def test_a_call_that_is_told_to_fail_fails_and_changes_nothing() -> None:
    pool, kv = make()
    slot = kv.take_slot(1)
    for nth in range(1, 4):  # create, create, map.
        pool.trim()
        pool.fail_call(nth)
        with pytest.raises(RuntimeError, match="told to"):
            kv.extend([slot], [2 * TILE])
        assert owned(pool) == {"kv": 0, "cache": 0, "available": 0}
        assert kv.slot_state(slot) == "active"
    kv.extend([slot], [2 * TILE])
    assert kv.mapped_tokens(slot) == 2 * TILE


def test_faults_repeat_with_the_seed() -> None:
    def story(seed: int) -> list[bool]:
        pool, kv = make()
        slots = [kv.take_slot(1) for _ in range(4)]
        pool.inject_faults(seed, 0.2)
        outcomes = []
        for tiles in range(1, 4):
            for slot in slots:
                try:
                    kv.extend([slot], [tiles * TILE])
                    outcomes.append(True)
                except RuntimeError:
                    outcomes.append(False)
        pool.inject_faults(seed, 0)
        kv.close()
        assert pool.usage()["free"] == pool.usage()["limit"]
        return outcomes

    assert story(7) == story(7)
    assert story(7) != story(8)
    assert True in story(7)
    assert False in story(7)


def test_a_chunk_is_counted_once_and_belongs_to_kv_while_a_slot_has_it() -> None:
    pool, kv = make()
    first = request(kv, 4)
    ids = kv.slot_chunks(first, 0, 3)
    assert len(set(ids)) == 3
    pool.cache(ids)
    assert owned(pool) == {"kv": 4, "cache": 0, "available": 0}
    second = kv.take_empty_slot()
    kv.map_shared(second, ids)
    assert kv.mapped_tokens(second) == 3 * TILE
    assert kv.slot_chunks(second, 0, 3) == ids
    assert owned(pool) == {"kv": 4, "cache": 0, "available": 0}
    kv.release(first)  # Its fourth chunk comes after shared ones: nothing stays mapped.
    assert kv.slot_state(first) == "free"
    assert owned(pool) == {"kv": 3, "cache": 0, "available": 0}
    kv.release(second)
    assert owned(pool) == {"kv": 0, "cache": 3, "available": 0}
    third = kv.take_empty_slot()
    kv.map_shared(third, ids[:2])
    assert owned(pool) == {"kv": 2, "cache": 1, "available": 0}
    assert pool.uncache(ids[1:]) == CHUNK  # The other one is in use.
    assert owned(pool) == {"kv": 2, "cache": 0, "available": 0}
    kv.release(third)
    assert owned(pool) == {"kv": 0, "cache": 1, "available": 0}
    assert pool.uncache(ids[:1]) == CHUNK
    assert pool.usage()["free"] == pool.usage()["limit"]


def test_caching_is_all_or_nothing() -> None:
    pool, kv = make()
    slot = request(kv, 3)
    ids = kv.slot_chunks(slot, 0, 3)
    for wrong in ([*ids, ids[0]], [ids[0], 1 << 40]):
        with pytest.raises(ValueError, match="chunk"):
            pool.cache(wrong)
    pool.cache(ids[:1])
    with pytest.raises(ValueError, match="cached already"):
        pool.cache(ids)
    with pytest.raises(ValueError, match="not cached"):
        pool.uncache(ids)
    kv.release(slot)
    assert owned(pool) == {"kv": 0, "cache": 1, "available": 0}
    with pytest.raises(ValueError, match="has no owner"):
        pool.cache(ids[1:])


def test_shared_chunks_need_an_empty_slot_and_chunks_that_stay() -> None:
    pool, kv = make()
    slot = request(kv, 2)
    ids = kv.slot_chunks(slot, 0, 2)
    other = request(kv, 1)
    with pytest.raises(ValueError, match="take an empty slot"):
        kv.map_shared(other, ids)
    empty = kv.take_empty_slot()
    kv.release(slot)  # Nobody else has them: they stay mapped, for the next request.
    assert kv.slot_state(slot) == "available"
    with pytest.raises(ValueError, match="only a dead slot"):
        kv.map_shared(empty, ids)
    assert owned(pool) == {"kv": 1, "cache": 0, "available": 2}
    for begin, end in ((-1, 1), (1, 0), (0, 2)):
        with pytest.raises(ValueError, match="has 1"):
            kv.slot_chunks(other, begin, end)
    with pytest.raises(ValueError, match="no slot 4"):
        kv.slot_chunks(4, 0, 0)


def test_an_empty_slot_is_free_or_made_so() -> None:
    pool, kv = make()
    slots = [request(kv, n) for n in (3, 1, 2, 4)]
    with pytest.raises(OutOfMemory, match="all 4 are in use"):
        kv.take_empty_slot()
    for slot in slots[:3]:
        kv.release(slot)
    assert kv.take_empty_slot() == slots[1]
    assert kv.mapped_tokens(slots[1]) == 0
    assert owned(pool) == {"kv": 4, "cache": 0, "available": 5}


def test_premap_takes_what_there_is_and_extend_does_the_rest() -> None:
    pool, kv = make(chunks=6)
    slots = [request(kv, 1) for _ in range(3)]
    assert kv.premap(slots, [2 * TILE, 4 * TILE, 2 * TILE]) == 3  # 1, 2 of 3, none.
    assert owned(pool)["kv"] == 6
    kv.settle()
    assert [kv.mapped_tokens(slot) // TILE for slot in slots] == [2, 3, 1]
    assert kv.premap(slots, [TILE] * 3) == 0
    kv.truncate(slots[0], TILE)
    kv.extend(slots, [TILE, 4 * TILE, TILE])
    assert [kv.mapped_tokens(slot) // TILE for slot in slots] == [1, 4, 1]
    with pytest.raises(ValueError, match="one count per slot"):
        kv.premap(slots, [TILE])
    with pytest.raises(ValueError, match="take it first"):
        kv.premap([3], [TILE])


def test_a_premap_that_failed_gives_back_and_is_tried_again() -> None:
    pool, kv = make()
    slot = request(kv, 1)
    pool.fail_call(2)
    assert kv.premap([slot], [4 * TILE]) == 3
    kv.settle()
    assert owned(pool)["kv"] == 1
    kv.extend([slot], [4 * TILE])
    assert owned(pool)["kv"] == 4


def test_release_async_accounts_at_once() -> None:
    pool, kv = make(chunks=8)
    slot = request(kv, 5)
    ids = kv.slot_chunks(slot, 1, 3)
    pool.cache(ids)
    kv.release_async(slot)
    assert owned(pool)["kv"] == 0
    assert owned(pool)["cache"] == 2
    assert pool.usage()["free"] == 6 * CHUNK
    kv.settle()
    assert kv.slot_state(slot) == "available"
    assert owned(pool) == {"kv": 0, "cache": 2, "available": 1}
    stats = kv.stats()
    assert stats["available_bytes"] == CHUNK
    assert stats["dying_slots"] == stats["dying_bytes"] == 0
    with pytest.raises(ValueError, match="take it first"):
        kv.release_async(slot)
    whole = request(kv, 6)  # All that is left, the available chunk included.
    kv.release_async(whole)
    assert pool.uncache(ids) == 2 * CHUNK
    pool.reserve("activation", CHUNK)
    pool.give_back("activation", CHUNK)


def test_a_dying_slot_that_cannot_be_unmapped_is_broken_until_reclaimed() -> None:
    pool, kv = make()
    slot = request(kv, 3)
    ids = kv.slot_chunks(slot, 0, 1)
    pool.cache(ids)
    pool.fail_call(1)
    kv.release_async(slot)
    kv.settle()
    assert kv.slot_state(slot) == "broken"
    assert owned(pool) == {"kv": 3, "cache": 0, "available": 0}
    assert kv.reclaim(CHUNK) == 3 * CHUNK
    assert owned(pool) == {"kv": 0, "cache": 1, "available": 0}
    assert kv.slot_state(slot) == "free"


def test_readers_on_other_threads_see_a_consistent_ledger() -> None:
    pool, kv = make(chunks=32)
    done = threading.Event()
    problems: list[BaseException] = []

    def read() -> None:
        try:
            while not done.is_set():
                owned(pool)
                stats = kv.stats()
                states = ("active", "available", "free", "dying", "broken")
                assert sum(stats[f"{state}_slots"] for state in states) == 4
        except BaseException as problem:
            problems.append(problem)

    reader = threading.Thread(target=read)
    reader.start()
    cached: list[int] = []
    for turn in range(300):
        slot = kv.take_empty_slot()
        if cached:
            kv.map_shared(slot, cached)
        kv.premap([slot], [(2 + turn % 6) * TILE])
        kv.extend([slot], [(3 + turn % 5) * TILE])
        if not cached:
            cached = kv.slot_chunks(slot, 0, 1 + turn % 3)
            pool.cache(cached)
        kv.release_async(slot)
        if turn % 7 == 0:
            pool.uncache(cached)
            cached = []
    done.set()
    reader.join()
    assert problems == []
    kv.close()
    if cached:
        pool.uncache(cached)
    assert pool.usage()["free"] == pool.usage()["limit"]
