"""The native memory on a CUDA device: mapped, copied to and from, limited, and given back."""

import ctypes
import time
from collections.abc import Iterator

import numpy as np
import pytest

from ellm_jax import _native as native

pytestmark = pytest.mark.gpu

MIB = 1 << 20
# A token takes 16 KiB: 128 of them fill 2 MiB.
LAYOUT_ARGS = (16, 2, 64, 4, 1 << 16, 8)


@pytest.fixture(scope="module")
def name(device: str) -> str:
    """The device as the native library calls it."""
    return "cuda:0" if device == "cuda" else device


@pytest.fixture
def cuda_only(device: str) -> None:
    if device != "cuda":
        pytest.skip("about the memory of a GPU")


@pytest.fixture
def layout(name: str) -> native.KvLayout:
    granularity = native.granularity_bytes(name)
    return native.KvLayout.choose(*LAYOUT_ARGS, granularity_bytes=granularity)


@pytest.fixture
def pool(layout: native.KvLayout, name: str) -> native.Pool:
    return native.Pool(layout.chunk_bytes, 64 * layout.chunk_bytes, device=name)


@pytest.fixture
def buffer(layout: native.KvLayout, name: str) -> native.HostBuffer:
    return native.HostBuffer(layout.chunk_bytes, 64 * layout.chunk_bytes, device=name)


@pytest.fixture
def copier(name: str) -> Iterator[native.Copier]:
    copier = native.Copier(name)
    yield copier
    copier.close()


@pytest.fixture
def kv(pool: native.Pool, layout: native.KvLayout) -> Iterator[native.KvCache]:
    kv = native.KvCache(pool, layout)
    yield kv
    kv.close()
    pool.back_ahead(0)
    pool.trim()
    assert pool.usage()["physical"] == pool.usage()["cache"]


def free_bytes() -> int:
    return int(native.cuda_devices()[0]["free_bytes"])


def memory(buffer: native.HostBuffer, block: int) -> np.ndarray:
    """A host block, to read and write."""
    at = (ctypes.c_uint8 * buffer.block_bytes).from_address(buffer.address(block))
    return np.frombuffer(at, dtype=np.uint8)


def slot_of(kv: native.KvCache, tiles: int) -> int:
    slot = kv.take_empty_slot()
    kv.extend([slot], [tiles * kv.layout.tile_tokens])
    return slot


def fill(buffer: native.HostBuffer, blocks: list[int], seed: int) -> np.ndarray:
    data = np.random.default_rng(seed).integers(
        0, 256, (len(blocks), buffer.block_bytes), dtype=np.uint8
    )
    for block, content in zip(blocks, data, strict=True):
        memory(buffer, block)[:] = content
    return data


def contents(buffer: native.HostBuffer, blocks: list[int]) -> np.ndarray:
    return np.stack([memory(buffer, block) for block in blocks])


def test_the_device_says_what_it_is() -> None:
    for device in native.cuda_devices():
        assert device["name"]
        assert 0 < device["free_bytes"] <= device["total_bytes"]
        assert device["compute_capability"] >= (7, 0)


def test_chunks_go_there_and_back_through_the_device(kv, layout, buffer, copier) -> None:
    slot = slot_of(kv, 24)
    out, back = buffer.take(24), buffer.take(24)
    data = fill(buffer, out, seed=1)
    copier.wait(copier.fetch(kv, slot, 0, buffer, out))
    copier.wait(copier.offload(kv, slot, 0, buffer, back[::-1]))
    np.testing.assert_array_equal(contents(buffer, back[::-1]), data)
    # Out of the middle, to other chunks, and back.
    other = slot_of(kv, 9)
    copier.wait(copier.offload(kv, slot, 7, buffer, back[:5]))
    copier.wait(copier.fetch(kv, other, 3, buffer, back[:5]))
    copier.wait(copier.offload(kv, other, 3, buffer, back[10:15]))
    np.testing.assert_array_equal(contents(buffer, back[10:15]), data[7:12])
    stats = copier.stats()
    assert stats["fetch_bytes"] == 29 * layout.chunk_bytes
    assert stats["offload_bytes"] == 34 * layout.chunk_bytes


def test_a_shared_chunk_is_one_chunk_at_two_addresses(pool, kv, layout, buffer, copier) -> None:
    first = slot_of(kv, 4)
    blocks = buffer.take(4)
    data = fill(buffer, blocks, seed=2)
    copier.wait(copier.fetch(kv, first, 0, buffer, blocks))
    shared = kv.slot_chunks(first, 0, 3)
    pool.cache(shared)
    second = kv.take_empty_slot()
    kv.map_shared(second, shared)
    kv.release(first)
    kv.trim_available()
    got = buffer.take(3)
    copier.wait(copier.offload(kv, second, 0, buffer, got))
    np.testing.assert_array_equal(contents(buffer, got), data[:3])
    kv.release(second)
    kv.trim_available()
    assert pool.uncache(shared) == 3 * layout.chunk_bytes


def test_data_survives_unmapping_and_mapping_elsewhere(pool, kv, buffer, copier) -> None:
    slot = slot_of(kv, 6)
    blocks = buffer.take(6)
    data = fill(buffer, blocks, seed=3)
    copier.wait(copier.fetch(kv, slot, 0, buffer, blocks))
    kept = kv.slot_chunks(slot, 0, 6)
    pool.cache(kept)
    kv.release(slot)
    kv.trim_available()
    assert kv.stats()["active_bytes"] == kv.stats()["available_bytes"] == 0
    again = kv.take_empty_slot()
    kv.map_shared(again, kept)
    back = buffer.take(6)
    copier.wait(copier.offload(kv, again, 0, buffer, back))
    np.testing.assert_array_equal(contents(buffer, back), data)
    pool.uncache(kept)


@pytest.mark.usefixtures("cuda_only")
def test_the_device_has_less_memory_by_what_is_physical_and_gets_it_back(layout, name) -> None:
    pool = native.Pool(layout.chunk_bytes, 256 * layout.chunk_bytes, device=name)
    kv = native.KvCache(pool, layout)
    before = free_bytes()
    for _ in range(4):
        slot_of(kv, 64)
    physical = pool.usage()["physical"]
    taken = before - free_bytes()
    assert physical <= taken <= physical + 64 * MIB
    kv.close()
    pool.trim()
    assert before - free_bytes() <= 64 * MIB
    assert pool.usage()["physical"] == 0


def test_the_limit_holds(pool, kv, layout) -> None:
    slot = slot_of(kv, 60)
    with pytest.raises(native.OutOfMemory):
        kv.extend([slot_of(kv, 0)], [5 * layout.tile_tokens])
    usage = pool.usage()
    assert usage["kv"] == 60 * layout.chunk_bytes
    assert usage["physical"] <= usage["limit"]
    kv.release(slot)


@pytest.mark.usefixtures("cuda_only")
def test_more_than_the_device_has_is_an_error_and_no_crash(name) -> None:
    total = native.cuda_devices()[0]["total_bytes"]
    pool = native.Pool(64 * MIB, 2 * total, device=name)
    large = native.KvLayout.choose(64, 16, 128, 4, 1 << 18, 8, granularity_bytes=64 * MIB)
    assert large.chunk_bytes == 64 * MIB
    kv = native.KvCache(pool, large)
    slot = kv.take_slot(0)
    grown: list[int] = []

    def grow() -> None:
        for tokens in range(16 * large.tile_tokens, large.max_tokens, 16 * large.tile_tokens):
            kv.extend([slot], [tokens])
            grown.append(tokens)

    with pytest.raises(RuntimeError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        grow()
    assert kv.slot_state(slot) == "active"
    assert pool.usage()["kv"] == grown[-1] // large.tile_tokens * large.chunk_bytes
    kv.close()
    assert pool.trim() > 0


def test_memory_is_made_ahead_on_the_device(pool, kv, layout) -> None:
    pool.back_ahead(16 * layout.chunk_bytes)
    deadline = time.monotonic() + 20
    while pool.usage()["backed_free"] < 16 * layout.chunk_bytes:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    pool.back_ahead(0)
    calls = pool.usage()["create_calls"]
    slot_of(kv, 16)
    assert pool.usage()["create_calls"] == calls


def test_slots_are_mapped_and_unmapped_on_the_caches_thread(
    pool, kv, layout, buffer, copier
) -> None:
    blocks, back = buffer.take(8), buffer.take(8)
    for round_ in range(20):
        slot = kv.take_empty_slot()
        assert kv.premap([slot], [8 * layout.tile_tokens]) == 8
        kv.extend([slot], [8 * layout.tile_tokens])
        data = fill(buffer, blocks, seed=round_)
        copier.wait(copier.fetch(kv, slot, 0, buffer, blocks))
        copier.wait(copier.offload(kv, slot, 0, buffer, back))
        np.testing.assert_array_equal(contents(buffer, back), data)
        kv.release_async(slot)
    kv.settle()
    pool.synchronize()
    usage = pool.usage()
    assert usage["kv"] == 0
    assert usage["free"] == usage["limit"]


def test_both_directions_at_once_keep_their_data(kv, layout, buffer, copier) -> None:
    buffer.prepare(64 * layout.chunk_bytes)
    one, two = slot_of(kv, 12), slot_of(kv, 12)
    a, b, c = buffer.take(12), buffer.take(12), buffer.take(12)
    first = fill(buffer, a, seed=11)
    copier.wait(copier.fetch(kv, one, 0, buffer, a))
    second = fill(buffer, b, seed=12)
    for _ in range(10):
        tickets = [copier.offload(kv, one, 0, buffer, c), copier.fetch(kv, two, 0, buffer, b)]
        for ticket in tickets:
            copier.wait(ticket)
        np.testing.assert_array_equal(contents(buffer, c), first)
    copier.wait(copier.offload(kv, two, 0, buffer, c))
    np.testing.assert_array_equal(contents(buffer, c), second)


@pytest.mark.usefixtures("cuda_only")
def test_things_of_different_devices_are_not_mixed(kv, layout, buffer, copier) -> None:
    slot = slot_of(kv, 1)
    plain = native.HostBuffer(layout.chunk_bytes, layout.chunk_bytes)
    with pytest.raises(ValueError, match="same device"):
        copier.offload(kv, slot, 0, plain, plain.take(1))
    with pytest.raises(ValueError, match="same device"):
        native.Copier().offload(kv, slot, 0, buffer, buffer.take(1))


def test_mapping_is_timed(layout, name) -> None:
    times = native.time_mapping(name, layout.chunk_bytes, 64, 3)
    expected = {"create", "map", "unmap", "map_batched", "unmap_batched", "destroy"}
    if name != "cpu":
        expected |= {"set_access", "set_access_batched"}
    assert set(times) == expected
    assert all(0 < us < 1e6 for values in times.values() for us in values)


@pytest.mark.usefixtures("cuda_only")
def test_no_such_device() -> None:
    count = len(native.cuda_devices())
    with pytest.raises(ValueError, match=f"there are {count}, from cuda:0"):
        native.Pool(2 * MIB, 64 * MIB, device=f"cuda:{count}")
