"""The native host tier and arena as Python sees them; the C++ tests go deeper."""

import ctypes
import gc
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ellm_jax import _native as native
from ellm_jax.runtime import ops
from ellm_jax.runtime.batch import Span, StepLayout, StepShape

ops.register()

LAYOUT = native.KvLayout.choose(2, 2, 16, 4, 2048, 4)
CHUNK = LAYOUT.chunk_bytes
TILES = LAYOUT.chunks_for(LAYOUT.max_tokens)


def memory(address: int, size: int = CHUNK) -> np.ndarray:
    """The `size` bytes at an address, to read and write."""
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=np.uint8)


@pytest.fixture
def pool() -> native.Pool:
    return native.Pool(CHUNK, 64 * CHUNK)


def slot_of(kv: native.KvCache, tiles: int) -> int:
    slot = kv.take_slot(0)
    kv.extend([slot], [tiles * LAYOUT.tile_tokens])
    return slot


def check_books(buffer: native.HostBuffer) -> dict[str, int]:
    usage = buffer.usage()
    assert usage["used"] + usage["free"] == usage["limit"]
    assert usage["used"] <= usage["physical"] <= usage["limit"]
    return usage


def test_host_blocks_are_counted_to_the_byte() -> None:
    buffer = native.HostBuffer(CHUNK, 4 * CHUNK + 5)
    assert buffer.block_bytes == CHUNK
    blocks = buffer.take(3)
    assert len(set(blocks)) == 3
    assert check_books(buffer)["free"] == CHUNK + 5
    with pytest.raises(native.OutOfMemory, match=r"2 host blocks .* raise the limit"):
        buffer.take(2)
    with pytest.raises(native.OutOfMemory, match="give blocks back first"):
        buffer.resize(3 * CHUNK - 1)
    buffer.give_back(blocks[:2])
    assert check_books(buffer)["physical"] == 3 * CHUNK
    assert buffer.trim() == 2 * CHUNK
    buffer.resize(CHUNK)
    usage = check_books(buffer)
    assert (usage["used"], usage["physical"], usage["peak_used"]) == (CHUNK, CHUNK, 3 * CHUNK)
    for wrong in ([blocks[0]], [blocks[2], blocks[2]], [99]):
        with pytest.raises(ValueError, match="host block"):
            buffer.give_back(wrong)
    with pytest.raises(ValueError, match="nobody has taken it"):
        buffer.address(blocks[0])
    with pytest.raises(ValueError, match="must not be negative"):
        buffer.take(-1)
    with pytest.raises(ValueError, match="block_bytes"):
        native.HostBuffer(100, 1000)


def test_the_memory_of_blocks_is_real() -> None:
    def resident() -> int:
        with open("/proc/self/smaps_rollup") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Rss:"))

    buffer = native.HostBuffer(1 << 20, 64 << 20)
    before = resident()
    blocks = buffer.take(64)
    assert resident() - before > 60 << 20
    buffer.give_back(blocks)
    assert buffer.trim() == 64 << 20
    assert resident() - before < 8 << 20


def test_chunks_go_out_and_come_back(pool: native.Pool) -> None:
    kv = native.KvCache(pool, LAYOUT)
    buffer = native.HostBuffer(CHUNK, 16 * CHUNK)
    copier = native.Copier()
    source, target = slot_of(kv, 6), slot_of(kv, 5)
    rng = np.random.default_rng(7)
    blocks = [int(b) for b in rng.permutation(buffer.take(16))]
    data = rng.integers(0, 256, (6, CHUNK), dtype=np.uint8)
    for block, content in zip(blocks[:6], data, strict=True):
        memory(buffer.address(block))[:] = content
    # In, out of the middle to other blocks, into another slot, and out of that.
    copier.fetch(kv, source, 0, buffer, blocks[:6])
    copier.offload(kv, source, 2, buffer, blocks[6:9])
    copier.fetch(kv, target, 1, buffer, blocks[6:9])
    last = copier.offload(kv, target, 1, buffer, blocks[12:15])
    copier.wait(last)
    assert copier.done(last)
    for block, content in zip(blocks[6:9] + blocks[12:15], np.tile(data[2:5], (2, 1)), strict=True):
        np.testing.assert_array_equal(memory(buffer.address(block)), content)
    stats = copier.stats()
    assert stats["fetch_bytes"] == 9 * CHUNK
    assert stats["offload_bytes"] == 6 * CHUNK
    assert (stats["fetch_calls"], stats["offload_calls"]) == (2, 2)
    buffer.give_back(blocks)
    kv.close()
    copier.close()


def test_copies_that_cannot_be(pool: native.Pool) -> None:
    kv = native.KvCache(pool, LAYOUT)
    buffer = native.HostBuffer(CHUNK, 16 * CHUNK)
    copier = native.Copier()
    slot = slot_of(kv, 2)
    blocks = buffer.take(3)
    for wrong in ((-1, 0, blocks), (4, 0, blocks), (slot, -1, blocks), (slot, TILES - 2, blocks)):
        with pytest.raises(ValueError, match="slot"):
            copier.offload(kv, wrong[0], wrong[1], buffer, wrong[2])
    with pytest.raises(ValueError, match="nobody has taken it"):
        copier.fetch(kv, slot, 0, buffer, [15])
    large = native.HostBuffer(2 * CHUNK, 4 * CHUNK)
    large_blocks = large.take(1)
    with pytest.raises(ValueError, match="blocks of"):
        copier.fetch(kv, slot, 0, large, large_blocks)
    with pytest.raises(ValueError, match="no ticket"):
        copier.wait(1)
    ticket = copier.offload(kv, slot, 0, buffer, blocks)
    with pytest.raises(RuntimeError, match="only 2 of its tiles are mapped"):
        copier.wait(ticket)
    kv.close()
    ticket = copier.fetch(kv, slot, 0, buffer, blocks)
    with pytest.raises(RuntimeError, match="mapped"):
        copier.wait(ticket)
    buffer.give_back(blocks)
    copier.close()
    copier.close()
    assert copier.done(ticket)
    with pytest.raises(ValueError, match="closed"):
        copier.fetch(kv, slot, 0, buffer, [])


def test_simulated_pools_have_nothing_to_copy() -> None:
    pool = native.Pool.simulated(CHUNK, 16 * CHUNK)
    kv = native.KvCache(pool, LAYOUT)
    slot = slot_of(kv, 1)
    buffer = native.HostBuffer(CHUNK, CHUNK)
    with pytest.raises(ValueError, match="simulated"):
        native.Copier().offload(kv, slot, 0, buffer, buffer.take(1))
    with pytest.raises(ValueError, match="simulated"):
        native.Arena(pool, CHUNK).serve(kv)


def test_a_copier_may_go_before_its_copies_are_done(pool: native.Pool) -> None:
    kv = native.KvCache(pool, LAYOUT)
    buffer = native.HostBuffer(CHUNK, 32 * CHUNK)
    slot = slot_of(kv, 32)
    blocks = buffer.take(32)
    copier = native.Copier()
    for _ in range(20):
        copier.offload(kv, slot, 0, buffer, blocks)
    del copier
    gc.collect()
    buffer.give_back(blocks)  # Nothing is pinned any more.


def test_waiting_lets_other_threads_run(pool: native.Pool) -> None:
    kv = native.KvCache(pool, LAYOUT)
    buffer = native.HostBuffer(CHUNK, 32 * CHUNK)
    slot = slot_of(kv, 32)
    blocks = buffer.take(32)
    copier = native.Copier()
    tickets = [copier.offload(kv, slot, 0, buffer, blocks) for _ in range(50)]
    threads = [threading.Thread(target=copier.wait, args=(t,)) for t in tickets[-4:]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert all(copier.done(t) for t in tickets)


@pytest.mark.parametrize("simulated", [False, True])
def test_an_arena_keeps_what_is_freed_until_it_is_collected(simulated: bool) -> None:
    make = native.Pool.simulated if simulated else native.Pool
    pool = make(CHUNK, 8 * CHUNK)
    arena = native.Arena(pool, 16 * CHUNK - 1)
    first = arena.allocate(2 * CHUNK + 1)
    second = arena.allocate(1)
    if not simulated:
        memory(first, 3 * CHUNK)[:] = 1
        memory(second)[:] = 2
        assert memory(first, 3 * CHUNK).sum() == 3 * CHUNK
    assert arena.usage() == {
        "live": 4 * CHUNK,
        "inactive": 0,
        "mapped": 4 * CHUNK,
        "reserved": 16 * CHUNK,
    }
    arena.free(first)
    assert pool.usage()["activation"] == 4 * CHUNK
    assert arena.allocate(2 * CHUNK) == first
    assert arena.collect(10 * CHUNK) == CHUNK
    assert pool.usage()["activation"] == 3 * CHUNK
    with pytest.raises(native.OutOfMemory, match="chunks"):
        arena.allocate(6 * CHUNK)
    with pytest.raises(native.OutOfMemory, match="addresses"):
        arena.allocate(17 * CHUNK)
    with pytest.raises(ValueError, match="no segment of the arena"):
        arena.free(first + 1)
    with pytest.raises(ValueError, match="0 bytes"):
        arena.allocate(0)
    arena.free(first)
    arena.free(second)
    with pytest.raises(ValueError, match="free each segment once"):
        arena.free(first)
    del arena
    gc.collect()
    usage = pool.usage()
    assert usage["activation"] == 0
    assert usage["free"] == usage["limit"]


def test_an_arena_over_a_failing_driver_keeps_its_books() -> None:
    seed = 20250611
    pool = native.Pool.simulated(CHUNK, 12 * CHUNK)
    arena = native.Arena(pool, 24 * CHUNK)
    pool.inject_faults(seed, 0.2)
    rng = np.random.default_rng(seed)
    live: dict[int, int] = {}
    failures = 0
    for step in range(3000):
        try:
            if live and rng.random() < 0.5:
                address = list(live)[rng.integers(len(live))]
                arena.free(address)
                del live[address]
            elif rng.random() < 0.2:
                arena.collect(int(rng.integers(1, 8 * CHUNK)))
            else:
                chunks = int(rng.integers(1, 6))
                live[arena.allocate(chunks * CHUNK)] = chunks
        except native.OutOfMemory:
            pass
        except RuntimeError:
            failures += 1
        usage = arena.usage()
        assert usage["live"] == sum(live.values()) * CHUNK, f"step {step}, seed {seed}"
        assert usage["live"] + usage["inactive"] == usage["mapped"]
        assert pool.usage()["activation"] == usage["mapped"], f"step {step}, seed {seed}"
    assert failures > 50
    pool.inject_faults(0, 0)
    for address in live:
        arena.free(address)
    arena.collect(24 * CHUNK)
    assert pool.usage()["activation"] == 0


@jax.jit
def attend(q, k, v, meta, layer, window, epoch):
    return ops.attention(q, k, v, meta, layer, window, epoch, scale=0.125, soft_cap=0.0)


def decode_after(prompt_tokens: int, kv: native.KvCache, slot: int) -> np.ndarray:
    """The attention of a token after a prompt in one head of 64 elements."""
    rng = np.random.default_rng(11)
    out, epoch = None, jnp.zeros(1, jnp.int32)
    for past, rows in ((0, prompt_tokens), (prompt_tokens, 1)):
        q, k, v = (rng.standard_normal((rows, 1, 64)).astype(np.float32) for _ in range(3))
        kv.extend([slot], [past + rows])
        span = Span(slot, past, [0] * rows, True)
        meta = StepLayout(StepShape(rows, 8), kv.layout.num_slots).pack(kv.id, [span])
        out, epoch = attend(q, k, v, meta, np.int32(0), np.int32(0), epoch)
    return np.asarray(out)


def test_partial_results_of_a_step_are_activations_of_the_pool() -> None:
    layout = native.KvLayout.choose(1, 1, 64, 4, 4096, 4)
    pool = native.Pool(layout.chunk_bytes, 64 * layout.chunk_bytes)
    kv = native.KvCache(pool, layout)
    slot = kv.take_slot(0)
    plain = decode_after(3000, kv, slot)
    assert pool.usage()["peak_activation"] == 0
    arena = native.Arena(pool, 8 * layout.chunk_bytes)
    arena.serve(kv)
    np.testing.assert_array_equal(decode_after(3000, kv, slot), plain)
    usage = arena.usage()
    assert usage["live"] == 0
    assert usage["inactive"] == usage["mapped"] == pool.usage()["peak_activation"] > 0
    # The pool has nothing left, and the arena no inactive chunks: the heap will do.
    arena.collect(usage["mapped"])
    pool.reserve("weights", pool.usage()["obtainable"])
    np.testing.assert_array_equal(decode_after(3000, kv, slot), plain)
    assert arena.usage()["mapped"] == 0
    # The registration keeps the arena, until the cache is closed.
    del arena
    gc.collect()
    pool.give_back("weights", pool.usage()["weights"])
    decode_after(3000, kv, slot)
    assert pool.usage()["activation"] > 0
    kv.close()
    usage = pool.usage()
    assert usage["free"] == usage["limit"]
