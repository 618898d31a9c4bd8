"""The native memory for CUDA as Python sees it, as far as it can be seen without a GPU.

The C++ tests run the same code over a fake of the CUDA driver; tests/gpu has what needs a GPU.
"""

import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from ellm_jax import _native as native
from ellm_jax.runtime.batch import Span, StepLayout
from ellm_jax.runtime.shapes import StepShape

MIB = 1 << 20
NO_SUCH = ("gpu", "cuda", "cuda:", "cuda:-1", "cuda:x", "CPU", "")

without_cuda = pytest.mark.skipif(native.cuda_error() is None, reason="there is a CUDA driver here")


def test_whether_there_is_cuda_is_told_one_way_or_the_other() -> None:
    error = native.cuda_error()
    if error is None:
        for device in native.cuda_devices():
            assert device["name"]
            assert 0 < device["free_bytes"] <= device["total_bytes"]
            assert device["compute_capability"] >= (3, 0)
    else:
        assert native.cuda_devices() == []
        assert "CUDA" in error
        assert 'device="cpu"' in error


@without_cuda
@pytest.mark.parametrize(
    "call",
    [
        lambda: native.Pool(2 * MIB, 64 * MIB, device="cuda:0"),
        lambda: native.HostBuffer(2 * MIB, 64 * MIB, "cuda:0"),
        lambda: native.Copier("cuda:3"),
        lambda: native.granularity_bytes("cuda:0"),
        lambda: native.time_mapping("cuda:0", 2 * MIB, 1, 1),
    ],
)
def test_a_cuda_device_where_there_is_none_is_refused_with_the_reason(call) -> None:
    error = native.cuda_error()
    assert error is not None
    with pytest.raises(RuntimeError, match=re.escape(error)):
        call()


@pytest.mark.parametrize("name", NO_SUCH)
@pytest.mark.parametrize(
    "call",
    [
        lambda name: native.Pool(4096, 4096, name),
        lambda name: native.HostBuffer(4096, 4096, name),
        lambda name: native.Copier(name),
        lambda name: native.granularity_bytes(name),
        lambda name: native.time_mapping(name, 4096, 1, 1),
    ],
)
def test_names_of_no_device_are_refused(call, name: str) -> None:
    with pytest.raises(ValueError, match='use "cpu", "cuda:0"'):
        call(name)


def test_things_know_their_device() -> None:
    assert native.Pool(4096, 4096).device == "cpu"
    assert native.Pool(4096, 4096, device="cpu").device == "cpu"
    assert native.Pool.simulated(4096, 4096).device == "simulated"
    assert native.HostBuffer(4096, 4096).device == "cpu"
    assert native.granularity_bytes("cpu") == 4096


@pytest.mark.parametrize(
    ("granularity", "chunk", "tile"), [(4096, 64 << 10, 64), (2 * MIB, 2 * MIB, 256)]
)
def test_a_layout_keeps_to_the_granularity(granularity: int, chunk: int, tile: int) -> None:
    layout = native.KvLayout.choose(2, 2, 32, 2, 1024, 4, granularity)
    assert (layout.chunk_bytes, layout.tile_tokens) == (chunk, tile)
    # Llama 3 8B: 128 KiB per token.
    layout = native.KvLayout.choose(32, 8, 128, 2, 1024, 4, granularity_bytes=granularity)
    assert (layout.chunk_bytes, layout.tile_tokens) == (2 * MIB, 16)
    with pytest.raises(ValueError, match="granularity_bytes is 3000"):
        native.KvLayout.choose(2, 2, 64, 2, 1024, 4, granularity_bytes=3000)


def test_free_memory_is_made_ahead() -> None:
    pool = native.Pool(4096, 16 * 4096)
    pool.back_ahead(5 * 4096)
    deadline = time.monotonic() + 20
    while pool.usage()["backed_free"] < 5 * 4096 and time.monotonic() < deadline:
        time.sleep(0.001)
    usage = pool.usage()
    assert usage["backed_free"] == usage["physical"] == 5 * 4096
    assert usage["free"] == usage["limit"]
    pool.back_ahead(0)
    assert pool.trim() == 5 * 4096
    pool.synchronize()
    with pytest.raises(ValueError, match="must not be negative"):
        pool.back_ahead(-1)


def test_host_blocks_are_prepared() -> None:
    buffer = native.HostBuffer(4096, 10 * 4096)
    buffer.prepare(3 * 4096 + 5)
    assert buffer.usage()["physical"] == 3 * 4096
    assert buffer.usage()["used"] == 0
    buffer.prepare(1 << 40)
    assert buffer.usage()["physical"] == 10 * 4096


def test_host_blocks_are_prepared_ahead() -> None:
    limit = 256 * MIB
    buffer = native.HostBuffer(4096, limit)
    buffer.prepare_ahead(10 * 4096)
    deadline = time.monotonic() + 20
    while buffer.usage()["physical"] < 10 * 4096 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert buffer.usage()["physical"] == 10 * 4096
    buffer.prepare_ahead(limit)
    buffer.close()
    assert buffer.usage()["physical"] < limit
    assert buffer.usage()["used"] == 0
    buffer.close()
    assert len(buffer.take(3)) == 3
    with pytest.raises(ValueError, match="must not be negative"):
        buffer.prepare_ahead(-1)


@pytest.mark.parametrize("how", ["ended", "kept"])
def test_the_interpreter_may_end_while_blocks_are_prepared(how: str, tmp_path: Path) -> None:
    """Whether the buffer ends with it or is never ended."""
    program = """
import builtins, sys
from ellm_jax import _native
buffer = _native.HostBuffer(4096, 256 << 20)
buffer.prepare_ahead(256 << 20)
if sys.argv[1] == "kept":
    builtins.kept = [buffer]
    kept.append(kept)
"""
    command = [sys.executable, "-c", program, how]
    done = subprocess.run(command, timeout=60, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "rror" not in done.stderr


def test_other_threads_run_while_a_buffer_ends() -> None:
    buffer = native.HostBuffer(4096, 32 * MIB)
    buffer.prepare(32 * MIB)
    turns, over = [0], threading.Event()

    def run() -> None:
        while not over.is_set():
            turns[0] += 1
            time.sleep(1e-4)

    thread = threading.Thread(target=run)
    thread.start()
    while not turns[0]:
        time.sleep(1e-3)
    before, begin = turns[0], time.monotonic()
    del buffer
    during, seconds = turns[0] - before, time.monotonic() - begin
    over.set()
    thread.join()
    assert during > 2, f"{during} turns in {seconds} s"


def test_mapping_is_timed() -> None:
    times = native.time_mapping("cpu", 64 << 10, 10, 3)
    assert set(times) == {"create", "map", "unmap", "map_batched", "unmap_batched", "destroy"}
    for values in times.values():
        assert len(values) == 3
        assert all(0 < us < 1e6 for us in values)
    with pytest.raises(ValueError, match="at least one of each"):
        native.time_mapping("cpu", 4096, 0, 1)
    with pytest.raises(ValueError, match="pages"):
        native.time_mapping("cpu", 1000, 1, 1)


LAYOUT = native.KvLayout.choose(2, 2, 64, 4, 1024, 4)


@pytest.fixture
def kv() -> native.KvCache:
    cache = native.KvCache(native.Pool(LAYOUT.chunk_bytes, 64 * LAYOUT.chunk_bytes), LAYOUT)
    slot = cache.take_slot(0)
    cache.extend([slot], [20])
    return cache


def packed(kv: native.KvCache, *spans: Span) -> np.ndarray:
    return StepLayout(StepShape(64, 8), LAYOUT.num_slots).pack(kv.id, spans)


def test_a_step_is_checked_against_what_is_mapped(kv: native.KvCache) -> None:
    mapped = kv.mapped_tokens(0)
    kv.check_step(packed(kv))
    kv.check_step(packed(kv, Span(0, mapped - 3, [1, 2, 3], True)))
    wanted = rf"slot 0 is to hold tokens {mapped - 3} to {mapped + 1} but only {mapped} tokens"
    with pytest.raises(RuntimeError, match=wanted):
        kv.check_step(packed(kv, Span(0, mapped - 3, [1, 2, 3, 4], True)))
    with pytest.raises(RuntimeError, match="only 0 tokens are mapped; extend the slot"):
        kv.check_step(packed(kv, Span(0, 0, [1], True), Span(1, 0, [1], True)))


def test_metadata_that_makes_no_sense_is_refused(kv: native.KvCache) -> None:
    for span in (Span(-1, 0, [1], True), Span(4, 0, [1], True), Span(0, -1, [1], True)):
        with pytest.raises(ValueError, match="sequence 0"):
            kv.check_step(packed(kv, span))
    good = packed(kv, Span(0, 0, [1, 2], True))
    with pytest.raises(ValueError, match="does not hold 1 sequences"):
        kv.check_step(good[:10])
    with pytest.raises(ValueError, match="too short"):
        kv.check_step(good[:2])
    for wrong in (good.astype(np.int64), good.astype(np.float32), good.reshape(1, -1), good[::2]):
        with pytest.raises(TypeError):
            kv.check_step(wrong)


def test_a_check_costs_little(kv: native.KvCache) -> None:
    words = packed(kv, *[Span(0, 0, [1], True)] * 8)
    begin = time.perf_counter()
    for _ in range(1000):
        kv.check_step(words)
    assert (time.perf_counter() - begin) / 1000 < 100e-6
