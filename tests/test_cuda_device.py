"""How the parts of an engine on a GPU are put together: the real ones, where a CPU has them, and
stand-ins for CUDA's driver and kernels where it has not."""

import os
import time
from typing import Any

import jax
import pytest
from fake_cuda import FakeDriver

from ellm_jax import SamplingParams, _native
from ellm_jax.devices import cpu, cuda
from ellm_jax.devices.allocator import ENVIRONMENT
from ellm_jax.memory.balloon import DeviceBalloon
from ellm_jax.memory.device_pool import DevicePool
from ellm_jax.runtime import ops
from ellm_jax.runtime.ops import NativeOps

MIB = 1 << 20


class StandIn:
    """A CUDA device whose memory is the host's and whose kernels are the CPU's.

    Attributes:
        driver: CUDA's, which keeps the books of the memory pool.
        asked: of the native library and the kernels: what for, and with what.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, device_bytes: int = 1 << 30):
        self.driver = FakeDriver(device_bytes)
        self.asked: list[tuple[str, Any]] = []

        def on_host(kind: str, make: Any) -> Any:
            def made(*args: Any, device: str) -> Any:
                self.asked.append((kind, device))
                return make(*args)

            return made

        asked = self.asked

        class Ops(NativeOps):
            def __init__(self, meta: Any, rows: Any, *, kv_id: int, max_tokens: int):
                asked.append(("ops", (kv_id, max_tokens)))
                super().__init__(meta, rows)

        def load(devices: list[int], dtype: Any, **shape: int) -> None:
            self.asked.append(("kernels", (devices, dtype, shape)))

        for name in ("Pool", "HostBuffer", "Copier"):
            monkeypatch.setattr(cuda, name, on_host(name, getattr(_native, name)))
        monkeypatch.setattr(cuda, "granularity_bytes", lambda device: 2 * MIB)
        monkeypatch.setattr(cuda.cuda_ops, "register", ops.register)
        monkeypatch.setattr(cuda.cuda_ops, "CudaOps", Ops)
        monkeypatch.setattr(cuda.cuda_ops, "COMPILER_OPTIONS", None)
        monkeypatch.setattr(cuda.cuda_ops, "load_kernels", load)
        self.device = cuda.CudaDevice(jax.devices()[0], DevicePool(0, self.driver))
        monkeypatch.setattr("ellm_jax.assembly.open_devices", lambda *_: [self.device])

    def of(self, kind: str) -> list[Any]:
        return [what for asked, what in self.asked if asked == kind]


@pytest.fixture
def stand_in(monkeypatch):
    return StandIn(monkeypatch)


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)


def test_an_engine_is_put_together_and_answers_as_on_the_cpu(
    tiny_checkpoint, make_engine, monkeypatch
):
    prompts = [[i + 3] * (5 + 20 * i) for i in range(4)]
    plain = make_engine(tiny_checkpoint("llama"))
    expected = [o.token_ids for o in plain.generate(prompts, greedy(20))]
    stand_in = StandIn(monkeypatch)
    engine = make_engine(tiny_checkpoint("llama"), device_memory="128MiB", host_memory="8MiB")
    assert [o.token_ids for o in engine.generate(prompts, greedy(20))] == expected

    ledger = engine._loop.ledger
    assert ledger.chunk_bytes == 2 * MIB, "what the device maps at once"
    assert {what for kind in ("Pool", "HostBuffer", "Copier") for what in stand_in.of(kind)} == {
        "cuda:0"
    }
    assert isinstance(ledger._balloon, DeviceBalloon)
    layout = ledger.kv.layout
    assert set(stand_in.of("ops")) == {(ledger.kv.id, layout.max_tokens)}
    devices, _, shape = stand_in.of("kernels")[0]
    assert devices == [0]
    assert (shape["q_heads"], shape["kv_heads"], shape["head_dim"]) == (4, 2, 64)
    usage = ledger.usage()
    assert usage["workspace"] >= cuda.CudaDevice.rounding_bytes
    kept = stand_in.driver.pools[0].threshold
    assert kept == usage["weights"] + usage["workspace"] + usage["activation"]


def await_physical(buffer: Any, count_bytes: int) -> None:
    """Returns when a buffer has so much memory."""
    deadline = time.monotonic() + 20
    while buffer.usage()["physical"] < count_bytes:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_host_memory_is_pinned_beside_and_that_ends_with_the_engine(
    tiny_checkpoint, make_engine, stand_in
):
    engine = make_engine(tiny_checkpoint("llama"), device_memory="128MiB", host_memory="8MiB")
    await_physical(engine._loop.host._buffer, 8 * MIB)
    assert engine._loop.host.usage()["used"] == 0

    engine = make_engine(tiny_checkpoint("llama"), device_memory="128MiB", host_memory="4GiB")
    buffer = engine._loop.host._buffer
    await_physical(buffer, 8 * MIB)
    engine.close()
    physical = buffer.usage()["physical"]
    assert physical < 4 << 30
    time.sleep(0.02)
    assert buffer.usage()["physical"] == physical
    buffer.trim()


@pytest.mark.parametrize(
    ("limit", "ahead"), [(256 * MIB, 128 * MIB), (8192 * MIB, 512 * MIB), (70 << 30, 1 << 30)]
)
def test_chunks_are_made_ahead_by_the_size_of_the_limit(limit, ahead, stand_in, monkeypatch):
    class Asked:
        def __init__(self, *args: Any, device: str):
            self.ahead = 0

        def back_ahead(self, count_bytes: int) -> None:
            self.ahead = count_bytes

    monkeypatch.setattr(cuda, "Pool", Asked)
    assert stand_in.device.make_pool(2 * MIB, limit).ahead == ahead


def test_an_engine_on_the_cpu_leaves_gpus_for_one_that_may_follow(monkeypatch):
    """JAX initialises GPUs too when it is asked for the CPU."""
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(cpu, "has_cuda_kernels", lambda: False)
    cpu.open_cpu(1)
    assert not ENVIRONMENT.keys() & os.environ.keys(), "a build without CUDA has no use for it"
    monkeypatch.setattr(cpu, "has_cuda_kernels", lambda: True)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    cpu.open_cpu(1)
    assert os.environ["XLA_PYTHON_CLIENT_ALLOCATOR"] == "cuda_async"
    assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "true", "what the user has set stays"


def run_large_step(engine: Any, need_bytes: int) -> None:
    """Has activations hold so much, as after a step that needed it."""

    def reserve() -> None:
        ledger = engine._loop.ledger
        ledger.finish(ledger.reserve(need_bytes, [], []))

    engine._thread.call(reserve)


def test_the_pool_is_trimmed_when_kv_is_short_and_only_then(tiny_checkpoint, make_engine, stand_in):
    # Weights and arrays take some 66 MiB, a request at most 8 MiB of KV.
    engine = make_engine(
        tiny_checkpoint("llama"),
        device_memory="88MiB",
        max_num_seqs=4,
        prefix_caching=False,
        idle_trim_s=60.0,
    )
    engine._loop.compiler.make_way = None  # compiling takes memory, and trims, of its own
    calls = stand_in.driver.calls
    calls.clear()
    run_large_step(engine, 14 * MIB)
    engine.generate([[3] * 100], greedy(2))
    assert engine.memory().by_owner()["activation"] == 14 * MIB, "kept for the next large step"
    assert "cuMemPoolTrimTo" not in calls, "nobody was short of anything"
    engine.generate([[i + 3] * 40 for i in range(8)], greedy(200))
    moves = engine.stats().moves
    assert moves.get("inflate", 0) == calls.count("cuMemPoolTrimTo") > 0
    assert engine.memory().by_owner()["activation"] < 14 * MIB
    ledger = engine._loop.ledger
    usage = ledger.usage()
    kept = stand_in.driver.pools[0].threshold
    assert kept == usage["weights"] + usage["workspace"] + usage["activation"]
    engine.trim()
    assert stand_in.driver.pools[0].threshold < kept or usage["activation"] == 0
    assert stand_in.driver.depth == 0


def test_sleeping_gives_the_weights_share_back(tiny_checkpoint, make_engine, stand_in):
    engine = make_engine(tiny_checkpoint("llama"), device_memory="128MiB")
    before = engine.generate([[5, 6, 7]], greedy(4))[0].token_ids
    weights = engine.memory().by_owner()["weights"]
    awake = stand_in.driver.pools[0].threshold
    engine.sleep()
    assert stand_in.driver.pools[0].threshold <= awake - weights
    engine.wake()
    assert stand_in.driver.pools[0].threshold >= weights
    assert engine.generate([[5, 6, 7]], greedy(4))[0].token_ids == before


def test_without_a_limit_it_takes_what_the_device_has_free_less_a_tenth(monkeypatch):
    stand_in = StandIn(monkeypatch, device_bytes=1000 * MIB)
    fake = stand_in.driver.pools[0]
    fake.others_bytes = 400 * MIB
    # What an engine before has left in the pool is free too.
    fake.allocate(64 * MIB)
    fake.free(64 * MIB)
    assert stand_in.device.default_limit_bytes() == 540 * MIB


def test_a_driver_that_refuses_to_trim_costs_no_request(tiny_checkpoint, make_engine, stand_in):
    engine = make_engine(
        tiny_checkpoint("llama"), device_memory="88MiB", max_num_seqs=4, prefix_caching=False
    )
    prompts = [[i + 3] * 40 for i in range(8)]
    expected = [o.token_ids for o in engine.generate(prompts, greedy(200))]
    engine.trim()
    run_large_step(engine, 14 * MIB)
    calls = stand_in.driver.calls
    calls.clear()
    stand_in.driver.fail("cuMemPoolTrimTo")
    assert [o.token_ids for o in engine.generate(prompts, greedy(200))] == expected
    assert calls.count("cuMemPoolTrimTo") > 1, "it was tried again"
