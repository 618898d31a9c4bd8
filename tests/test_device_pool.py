"""The device's memory pool and the balloon, against a driver that keeps CUDA's rules."""

import logging
import sys
from types import ModuleType

import pytest
from fake_cuda import PIECE_BYTES, FakeDriver

from ellm_jax._native import KvCache, KvLayout, Pool
from ellm_jax.memory.balloon import DeviceBalloon, HeapBalloon
from ellm_jax.memory.device_pool import (
    CudaError,
    CudaUnavailable,
    DevicePool,
    device_count,
    driver_version,
    load_driver,
)
from ellm_jax.memory.events import EventLog
from ellm_jax.memory.ledger import Ledger

MIB = 1 << 20


def test_usage_follows_allocations_frees_and_peaks():
    driver = FakeDriver()
    pool, fake = DevicePool(0, driver), driver.pools[0]
    fake.allocate(40 * MIB)
    usage = pool.usage()
    assert (usage.used, usage.reserved) == (40 * MIB, 2 * PIECE_BYTES)
    fake.free(40 * MIB)
    assert pool.usage().used == 40 * MIB, "nobody has seen the stream pass the free"
    pool.keep(1 << 40)
    pool.synchronize()
    usage = pool.usage()
    assert (usage.used, usage.reserved) == (0, 2 * PIECE_BYTES)
    assert (usage.used_high, usage.reserved_high) == (40 * MIB, 2 * PIECE_BYTES)
    pool.reset_peaks()
    usage = pool.usage()
    assert (usage.used_high, usage.reserved_high) == (0, 2 * PIECE_BYTES)


def test_the_threshold_matters_when_the_host_synchronises_and_not_before():
    driver = FakeDriver()
    pool, fake = DevicePool(0, driver), driver.pools[0]
    pool.keep(1 << 40)
    fake.allocate(320 * MIB)
    fake.free(320 * MIB)
    pool.synchronize()
    assert pool.usage().reserved == 320 * MIB
    pool.keep(64 * MIB)
    assert pool.usage().reserved == 320 * MIB
    assert pool.usage().threshold == 64 * MIB
    pool.synchronize()
    assert pool.usage().reserved == 64 * MIB


def test_a_trim_gives_back_what_is_unused_and_no_more():
    driver = FakeDriver()
    pool, fake = DevicePool(0, driver), driver.pools[0]
    pool.keep(1 << 40)
    fake.allocate(96 * MIB)
    fake.allocate(256 * MIB)
    fake.free(256 * MIB)
    assert pool.trim(0) == 0, "the free is not seen yet"
    pool.synchronize()
    assert pool.trim(200 * MIB) == 352 * MIB - 192 * MIB
    assert pool.trim(0) == 96 * MIB
    assert pool.usage().reserved == pool.usage().used == 96 * MIB
    assert pool.trim(0) == 0


def test_what_the_device_says_of_itself():
    driver = FakeDriver(devices=2)
    pool = DevicePool(1, driver)
    driver.pools[1].others_bytes = 100 * MIB
    assert pool.memory_info() == ((1 << 30) - 100 * MIB, 1 << 30)
    assert pool.name() == "Fake GPU"
    assert pool.compute_capability() == (9, 0)
    assert device_count(driver) == 2
    assert driver_version(driver) == "13.0"
    assert driver.depth == 0, "a context was left current"


@pytest.mark.parametrize(
    ("function", "call"),
    [
        ("cuMemPoolTrimTo", lambda pool: pool.trim(0)),
        ("cuMemPoolSetAttribute", lambda pool: pool.keep(5)),
        ("cuMemPoolGetAttribute", lambda pool: pool.usage()),
        ("cuCtxSynchronize", lambda pool: pool.synchronize()),
        ("cuMemGetInfo", lambda pool: pool.memory_info()),
        ("cuCtxPushCurrent", lambda pool: pool.memory_info()),
    ],
)
def test_a_call_that_fails_says_which_and_why_and_leaves_no_context(function, call):
    driver = FakeDriver()
    pool = DevicePool(0, driver)
    driver.fail(function)
    with pytest.raises(CudaError, match=r"GPU 0.*failed: CUDA_ERROR_UNKNOWN, unknown error"):
        call(pool)
    assert driver.depth == 0
    call(pool)


def test_devices_without_pools_and_devices_that_are_not_there_are_refused():
    with pytest.raises(CudaError, match="no memory pools"):
        DevicePool(0, FakeDriver(has_pools=False))
    with pytest.raises(CudaError, match="opening the device"):
        DevicePool(3, FakeDriver())


def _as_module(monkeypatch: pytest.MonkeyPatch, driver: object) -> None:
    package, bindings = ModuleType("cuda"), ModuleType("cuda.bindings")
    monkeypatch.setitem(sys.modules, "cuda", package)
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)  # type: ignore[arg-type]


def test_the_bindings_are_looked_for_and_started(monkeypatch):
    driver = FakeDriver()
    _as_module(monkeypatch, driver)
    assert load_driver() is driver
    assert driver.calls == ["cuInit"]


def test_missing_bindings_and_drivers_are_told_apart(monkeypatch):
    _as_module(monkeypatch, None)
    with pytest.raises(CudaUnavailable, match=r"pip install 'ellm-jax\[cuda\]'"):
        load_driver()
    driver = FakeDriver()
    driver.fail("cuInit", 100)
    _as_module(monkeypatch, driver)
    with pytest.raises(CudaUnavailable, match=r"does not start: CUDA_ERROR_OF_100.*nvidia-smi"):
        load_driver()

    class NoLibrary(FakeDriver):
        def cuInit(self, flags: int) -> tuple[object, ...]:  # noqa: N802
            raise RuntimeError("libcuda.so.1 is not there")

    _as_module(monkeypatch, NoLibrary())
    with pytest.raises(CudaUnavailable, match=r"libcuda\.so\.1 is not there.*device='cpu'"):
        load_driver()


def test_the_heap_is_trimmed_and_needs_no_telling():
    trims: list[int] = []
    balloon = HeapBalloon(16 * MIB, lambda: trims.append(1))
    balloon.keep(5)
    assert not trims
    balloon.trim(5)
    assert trims == [1]
    assert balloon.retained_bytes == 16 * MIB


def test_a_balloon_waits_before_it_trims_and_lowers_the_threshold():
    driver = FakeDriver()
    fake = driver.pools[0]
    order: list[str] = []
    balloon = DeviceBalloon(DevicePool(0, driver), lambda: order.append("settled"))
    balloon.keep(320 * MIB)
    assert fake.threshold == 320 * MIB
    fake.allocate(64 * MIB)
    fake.allocate(256 * MIB)
    fake.free(256 * MIB)
    driver.calls.clear()
    balloon.trim(96 * MIB)
    assert order == ["settled"]
    assert (fake.threshold, fake.reserved) == (96 * MIB, 96 * MIB)
    assert driver.calls.index("cuCtxSynchronize") < driver.calls.index("cuMemPoolTrimTo")


def test_a_driver_that_refuses_a_threshold_stops_nobody(caplog):
    driver = FakeDriver()
    balloon = DeviceBalloon(DevicePool(0, driver), lambda: None)
    driver.fail("cuMemPoolSetAttribute")
    with caplog.at_level(logging.WARNING):
        balloon.keep(5)
    assert "another amount" in caplog.text
    driver.fail("cuMemPoolTrimTo")
    with pytest.raises(RuntimeError, match="trimming"):
        balloon.trim(0)


class Steps:
    """A ledger over a pool of chunks and a device's memory pool, with steps as XLA would run them:
    what a step needs is allocated before it and freed, unseen by the host, behind it."""

    CHUNK = 2 * MIB

    def __init__(self, limit: int, fixed: int, *, left_behind: int = 0):
        self.limit, self.fixed = limit, fixed
        layout = KvLayout.choose(32, 8, 128, 2, 4096, 8)
        self.native = Pool.simulated(self.CHUNK, limit)
        self.native.reserve("weights", fixed)
        self.kv = KvCache(self.native, layout)
        driver = FakeDriver(limit)
        self.driver, self.fake = driver, driver.pools[0]
        self.fake.allocate(fixed)
        if left_behind:
            self.fake.threshold = 1 << 40
            self.fake.allocate(left_behind)
            self.fake.free(left_behind)
        balloon = DeviceBalloon(DevicePool(0, driver), lambda: None)
        self.clock = 0.0
        self.ledger = Ledger(
            self.native,
            self.kv,
            EventLog(lambda: self.clock),
            balloon=balloon,
            prefix_caching=False,
        )

    def step(self, need: int, slots: list[int], tokens: list[int]) -> None:
        lease = self.ledger.reserve(need, slots, tokens)
        # What the driver sees: all that the pool counts for KV, and the memory pool.
        usage = self.native.usage()
        counted = sum(usage[owner] for owner in ("weights", "workspace", "activation"))
        self.fake.others_bytes = usage["physical"] - counted
        self.fake.allocate(need)
        self.fake.free(need)
        self.ledger.finish(lease)
        self.ledger.check()


def test_kv_takes_what_a_step_left_behind_and_gives_it_back():
    steps = Steps(limit=256 * MIB, fixed=64 * MIB)
    layout = steps.kv.layout
    assert layout.chunk_bytes == steps.CHUNK
    slot = steps.ledger.open_slot(layout.tile_tokens)
    steps.step(128 * MIB, [slot], [layout.tile_tokens])
    assert steps.fake.reserved == 192 * MIB, "kept for the next step"
    assert steps.fake.threshold == 192 * MIB
    # 60 chunks: 120 MiB, of which 62 are free.
    tokens = 60 * layout.tile_tokens
    steps.step(32 * MIB, [slot], [tokens])
    log = steps.ledger.events
    assert log.totals()["inflate"] == (1, 96 * MIB)
    assert steps.fake.reserved == 96 * MIB
    # KV goes, and a large step comes.
    steps.ledger.release(slot)
    steps.kv.settle()
    slot = steps.ledger.open_slot(layout.tile_tokens)
    steps.step(160 * MIB, [slot], [layout.tile_tokens])
    assert steps.fake.reserved == 224 * MIB
    assert steps.fake.used_high <= 256 * MIB
    steps.ledger.close()


def test_an_inflation_that_the_driver_refuses_changes_nothing():
    steps = Steps(limit=256 * MIB, fixed=64 * MIB)
    layout = steps.kv.layout
    slot = steps.ledger.open_slot(layout.tile_tokens)
    steps.step(128 * MIB, [slot], [layout.tile_tokens])
    before = steps.native.usage()
    steps.driver.fail("cuMemPoolTrimTo")
    with pytest.raises(RuntimeError, match="trimming"):
        steps.ledger.reserve(32 * MIB, [slot], [60 * layout.tile_tokens])
    after = steps.native.usage()
    assert {k: after[k] for k in ("kv", "activation", "free")} == {
        k: before[k] for k in ("kv", "activation", "free")
    }
    steps.ledger.check()
    steps.step(32 * MIB, [slot], [60 * layout.tile_tokens])
    steps.ledger.close()


def test_a_trim_that_the_driver_refuses_leaves_the_memory_with_activations(caplog):
    steps = Steps(limit=256 * MIB, fixed=64 * MIB)
    steps.step(128 * MIB, [], [])
    steps.driver.fail("cuCtxSynchronize")
    with caplog.at_level(logging.WARNING):
        steps.ledger.trim()
    assert "could not be given back" in caplog.text
    assert steps.fake.reserved == 192 * MIB
    assert steps.native.usage()["activation"] == 128 * MIB, "KV may not take what is not there"
    steps.ledger.check()
    steps.ledger.trim()
    assert steps.native.usage()["activation"] == 0
    assert steps.fake.reserved == 64 * MIB
    steps.ledger.close()


def test_what_loading_and_compiling_left_goes_back_at_the_start():
    before = 320 * MIB
    steps = Steps(limit=512 * MIB, fixed=64 * MIB, left_behind=before)
    assert steps.fake.reserved == 64 * MIB
    steps.ledger.close()


def test_way_is_made_for_what_no_ledger_counts():
    steps = Steps(limit=256 * MIB, fixed=64 * MIB)
    layout = steps.kv.layout
    slot = steps.ledger.open_slot(layout.tile_tokens)
    steps.step(128 * MIB, [slot], [16 * layout.tile_tokens])
    steps.ledger.truncate(slot, layout.tile_tokens)
    lease = steps.ledger.reserve(32 * MIB, [slot], [layout.tile_tokens])
    steps.ledger.make_way()
    usage = steps.native.usage()
    assert usage["activation"] == 32 * MIB, "what the step in flight needs stays"
    assert usage["physical"] == steps.fixed + 32 * MIB + usage["kv"], "free chunks are gone"
    assert steps.fake.reserved <= 96 * MIB
    steps.ledger.finish(lease)
    steps.ledger.close()


def test_the_stand_in_has_the_names_of_the_real_bindings():
    real = pytest.importorskip("cuda.bindings.driver")
    driver = FakeDriver()
    for name in (n for n in dir(FakeDriver) if n.startswith("cu")):
        assert callable(getattr(real, name)), name
    for enum in ("CUmemPool_attribute", "CUdevice_attribute"):
        for name in vars(getattr(driver, enum)):
            assert isinstance(int(getattr(getattr(real, enum), name)), int), name
    assert int(real.cuuint64_t(5)) == 5
    try:
        (code,) = real.cuInit(0)
    except RuntimeError:
        with pytest.raises(CudaUnavailable, match="device='cpu'"):
            load_driver()
    else:
        assert int(code) >= 0
