# The names are CUDA's.
# ruff: noqa: N802
"""A stand-in for the module `cuda.bindings.driver`, with the rules of CUDA's memory pools.

- A pool takes memory from the device in whole pieces, and keeps what is freed.
- A free is a note in the stream: later allocations in it may have the memory, but it counts as used
  until the host has synchronised.
- Synchronising gives back what is unused above the release threshold, and only then does the
  threshold matter.
- Trimming gives back what is unused, down to the amount asked for, never below what is used.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

PIECE_BYTES = 32 << 20
_ATTRIBUTES = (
    "RELEASE_THRESHOLD",
    "RESERVED_MEM_CURRENT",
    "RESERVED_MEM_HIGH",
    "USED_MEM_CURRENT",
    "USED_MEM_HIGH",
)


class FakePool:
    """The default pool of one device."""

    def __init__(self, device_bytes: int):
        self.device_bytes = device_bytes
        self.others_bytes = 0  # what is taken from the device elsewhere
        self.threshold = 0
        self.reserved = self.reserved_high = 0
        self.live = 0  # in allocations
        self.freed_unseen = 0
        self.used_high = 0

    @property
    def used(self) -> int:
        return self.live + self.freed_unseen

    @property
    def free_bytes(self) -> int:
        return self.device_bytes - self.reserved - self.others_bytes

    def allocate(self, count_bytes: int) -> None:
        # What was freed in the stream before may be used again in it, seen or not.
        self.freed_unseen -= min(self.freed_unseen, count_bytes)
        if self.used + count_bytes > self.reserved:
            missing = self.used + count_bytes - self.reserved
            pieces = -(-missing // PIECE_BYTES) * PIECE_BYTES
            if pieces > self.free_bytes:
                raise MemoryError("the device is full")
            self.reserved += pieces
        self.live += count_bytes
        self.reserved_high = max(self.reserved_high, self.reserved)
        self.used_high = max(self.used_high, self.used)

    def free(self, count_bytes: int) -> None:
        assert count_bytes <= self.live
        self.live -= count_bytes
        self.freed_unseen += count_bytes

    def synchronize(self) -> None:
        self.freed_unseen = 0
        if self.reserved > self.threshold:
            self._shrink(self.threshold)

    def trim(self, keep_bytes: int) -> None:
        self._shrink(keep_bytes)

    def _shrink(self, keep_bytes: int) -> None:
        least = -(-self.used // PIECE_BYTES) * PIECE_BYTES
        while self.reserved > max(keep_bytes, 0) and self.reserved - PIECE_BYTES >= least:
            self.reserved -= PIECE_BYTES


class FakeDriver:
    """The module. `fail(function, code)` makes the next call of it fail.

    Attributes:
        pools: one per device.
        calls: names of the functions called.
        depth: contexts that were entered and not left.
    """

    def __init__(self, device_bytes: int = 1 << 30, devices: int = 1, *, has_pools: bool = True):
        self.pools = [FakePool(device_bytes) for _ in range(devices)]
        self.calls: list[str] = []
        self.depth = 0
        self.has_pools = has_pools
        self._failures: dict[str, int] = {}
        names = {f"CU_MEMPOOL_ATTR_{name}": name for name in _ATTRIBUTES}
        self.CUmemPool_attribute = SimpleNamespace(**names)
        self.CUdevice_attribute = SimpleNamespace(
            CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED="pools",
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major",
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR="minor",
        )
        self.cuuint64_t = int

    def fail(self, function: str, code: int = 999) -> None:
        self._failures[function] = code

    def _done(self, function: str, *values: Any) -> tuple[Any, ...]:
        self.calls.append(function)
        code = self._failures.pop(function, 0)
        return (code, *((None,) * len(values) if code else values))

    def cuInit(self, flags: int) -> tuple[Any, ...]:
        assert flags == 0
        return self._done("cuInit")

    def cuGetErrorName(self, code: int) -> tuple[Any, ...]:
        return 0, b"CUDA_ERROR_UNKNOWN" if code == 999 else b"CUDA_ERROR_OF_%d" % code

    def cuGetErrorString(self, code: int) -> tuple[Any, ...]:
        return 0, b"unknown error" if code == 999 else b"error %d" % code

    def cuDriverGetVersion(self) -> tuple[Any, ...]:
        return self._done("cuDriverGetVersion", 13000)

    def cuDeviceGetCount(self) -> tuple[Any, ...]:
        return self._done("cuDeviceGetCount", len(self.pools))

    def cuDeviceGet(self, ordinal: int) -> tuple[Any, ...]:
        if ordinal >= len(self.pools):
            return 101, None
        return self._done("cuDeviceGet", ordinal)

    def cuDeviceGetName(self, capacity: int, device: int) -> tuple[Any, ...]:
        return self._done("cuDeviceGetName", b"Fake GPU\0\0\0"[:capacity])

    def cuDeviceGetAttribute(self, attribute: str, device: int) -> tuple[Any, ...]:
        values = {"pools": int(self.has_pools), "major": 9, "minor": 0}
        return self._done("cuDeviceGetAttribute", values[attribute])

    def cuDeviceGetDefaultMemPool(self, device: int) -> tuple[Any, ...]:
        return self._done("cuDeviceGetDefaultMemPool", self.pools[device])

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Any, ...]:
        return self._done("cuDevicePrimaryCtxRetain", self.pools[device])

    def cuCtxPushCurrent(self, context: FakePool) -> tuple[Any, ...]:
        done = self._done("cuCtxPushCurrent")
        if not done[0]:
            self.depth += 1
            self._current = context
        return done

    def cuCtxPopCurrent(self) -> tuple[Any, ...]:
        self.depth -= 1
        return self._done("cuCtxPopCurrent", self._current)

    def cuCtxSynchronize(self) -> tuple[Any, ...]:
        assert self.depth > 0, "no context is current"
        done = self._done("cuCtxSynchronize")
        if not done[0]:
            self._current.synchronize()
        return done

    def cuMemGetInfo(self) -> tuple[Any, ...]:
        assert self.depth > 0, "no context is current"
        return self._done("cuMemGetInfo", self._current.free_bytes, self._current.device_bytes)

    def cuMemPoolGetAttribute(self, pool: FakePool, attribute: str) -> tuple[Any, ...]:
        values = {
            "RELEASE_THRESHOLD": pool.threshold,
            "RESERVED_MEM_CURRENT": pool.reserved,
            "RESERVED_MEM_HIGH": pool.reserved_high,
            "USED_MEM_CURRENT": pool.used,
            "USED_MEM_HIGH": pool.used_high,
        }
        return self._done("cuMemPoolGetAttribute", values[attribute])

    def cuMemPoolSetAttribute(self, pool: FakePool, attribute: str, value: int) -> tuple[Any, ...]:
        done = self._done("cuMemPoolSetAttribute")
        if done[0]:
            return done
        if attribute == "RELEASE_THRESHOLD":
            pool.threshold = value
        elif value == 0 and attribute == "RESERVED_MEM_HIGH":
            pool.reserved_high = pool.reserved
        elif value == 0 and attribute == "USED_MEM_HIGH":
            pool.used_high = pool.used
        else:
            return (1,)
        return done

    def cuMemPoolTrimTo(self, pool: FakePool, keep_bytes: int) -> tuple[Any, ...]:
        done = self._done("cuMemPoolTrimTo")
        if not done[0]:
            pool.trim(keep_bytes)
        return done
