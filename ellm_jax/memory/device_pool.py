"""A GPU's default memory pool, where XLA takes weights, arrays and the memory of steps from.

With its `cuda_async` allocator XLA allocates, in the order of the stream, from the pool that CUDA
makes for every device. Memory that was freed stays with the pool up to its release threshold; above
it the driver gives it back whenever the host synchronises with a stream, an event or the context.
Threshold and pool belong to the process, so both are steered from here, beside XLA (CUDA driver
API, "Stream Ordered Memory Allocator").
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ellm_jax.config import format_bytes


class CudaUnavailable(RuntimeError):
    """The CUDA driver cannot be reached: what was found instead, and what to do about it."""


class CudaError(RuntimeError):
    """A call of the CUDA driver failed: which, and what the driver says."""


@dataclass(frozen=True)
class PoolUsage:
    """What a memory pool holds, in bytes.

    Attributes:
        reserved: taken from the device, used or not; what other programs cannot have.
        used: in allocations. Frees count once the host has seen the stream pass them.
        reserved_high, used_high: the most of each since `DevicePool.reset_peaks`.
        threshold: how much of `reserved` the driver keeps when the host synchronises.
    """

    reserved: int
    used: int
    reserved_high: int
    used_high: int
    threshold: int


def load_driver() -> Any:
    """The module `cuda.bindings.driver`, initialised.

    Raises:
        CudaUnavailable: the package or the driver is missing.
    """
    try:
        driver = importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise CudaUnavailable(
            f"Python's bindings of the CUDA driver cannot be loaded ({error}); "
            "run: pip install 'ellm-jax[cuda]'"
        ) from error
    try:
        (code,) = driver.cuInit(0)
    except Exception as error:  # the bindings raise plain errors where libcuda.so is missing
        raise CudaUnavailable(
            f"the NVIDIA driver cannot be loaded ({error}); install it, or use device='cpu'"
        ) from error
    if int(code):
        raise CudaUnavailable(
            f"the NVIDIA driver does not start: {_explain(driver, code)}; see whether nvidia-smi "
            "works, or use device='cpu'"
        )
    return driver


def device_count(driver: Any) -> int:
    """GPUs that this process may use."""
    (count,) = _checked(driver, "counting the GPUs", driver.cuDeviceGetCount())
    return int(count)


def driver_version(driver: Any) -> str:
    """The CUDA version that the driver supports, such as "13.0"."""
    (version,) = _checked(driver, "asking for the driver's version", driver.cuDriverGetVersion())
    return f"{int(version) // 1000}.{int(version) % 1000 // 10}"


class DevicePool:
    """The default memory pool of one GPU. Thread-safe, as the driver is.

    Attributes:
        ordinal: the device's number in this process.
    """

    def __init__(self, ordinal: int, driver: Any | None = None):
        """Args:
        ordinal: of the device, as CUDA counts what the process may see.
        driver: the bindings; None: those installed.

        Raises:
            CudaUnavailable: there is no driver.
            CudaError: there is no such device, or it has no memory pools.
        """
        self._driver = load_driver() if driver is None else driver
        self.ordinal = ordinal
        (self._device,) = self._call("opening the device", self._driver.cuDeviceGet(ordinal))
        attributes = self._driver.CUdevice_attribute
        supported = attributes.CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED
        (pools,) = self._call(
            "asking for memory pools", self._driver.cuDeviceGetAttribute(supported, self._device)
        )
        if not int(pools):
            raise CudaError(
                f"GPU {ordinal} has no memory pools, which XLA's cuda_async allocator needs; "
                "use another GPU, or device='cpu'"
            )
        (self._pool,) = self._call(
            "finding the memory pool", self._driver.cuDeviceGetDefaultMemPool(self._device)
        )
        # JAX's own context: the primary one. Kept for as long as the process lives, as JAX does.
        (self._context,) = self._call(
            "opening a context", self._driver.cuDevicePrimaryCtxRetain(self._device)
        )

    def usage(self) -> PoolUsage:
        """What the pool holds now; each figure is read on its own."""
        return PoolUsage(
            reserved=self._get("RESERVED_MEM_CURRENT"),
            used=self._get("USED_MEM_CURRENT"),
            reserved_high=self._get("RESERVED_MEM_HIGH"),
            used_high=self._get("USED_MEM_HIGH"),
            threshold=self._get("RELEASE_THRESHOLD"),
        )

    def keep(self, count_bytes: int) -> None:
        """Sets the release threshold: from the next synchronisation on the driver keeps at most so
        much beyond what is used.

        Raises:
            CudaError: the driver refuses; the threshold is as it was.
        """
        self._set("RELEASE_THRESHOLD", count_bytes)

    def trim(self, keep_bytes: int = 0) -> int:
        """Gives unused memory back now, until at most `keep_bytes` are reserved or nothing more can
        go. Memory freed in a stream that the host has not synchronised with counts as used.

        Returns:
            The bytes that went.

        Raises:
            CudaError: the driver refuses; some may have gone.
        """
        before = self._get("RESERVED_MEM_CURRENT")
        self._call(
            f"trimming the memory pool to {format_bytes(keep_bytes)}",
            self._driver.cuMemPoolTrimTo(self._pool, keep_bytes),
        )
        return before - self._get("RESERVED_MEM_CURRENT")

    def reset_peaks(self) -> None:
        """Starts both highest values anew, from what is held now."""
        self._set("RESERVED_MEM_HIGH", 0)
        self._set("USED_MEM_HIGH", 0)

    def memory_info(self) -> tuple[int, int]:
        """Bytes of the device that are free, and all it has; as nvidia-smi sees them."""
        with self._current():
            free, total = self._call("asking for free memory", self._driver.cuMemGetInfo())
        return int(free), int(total)

    def synchronize(self) -> None:
        """Waits until the device has nothing more to do. Other Python threads run meanwhile.

        Raises:
            CudaError: something that ran before failed, or the device is lost.
        """
        with self._current():
            self._call("waiting for the device", self._driver.cuCtxSynchronize())

    def name(self) -> str:
        """The device's name, such as "NVIDIA H100 80GB HBM3"."""
        (raw,) = self._call("asking for the name", self._driver.cuDeviceGetName(256, self._device))
        text = raw.decode(errors="replace") if isinstance(raw, bytes) else str(raw)
        return text.split("\0", 1)[0].strip()

    def compute_capability(self) -> tuple[int, int]:
        """Major and minor, such as (9, 0) for Hopper."""
        names = self._driver.CUdevice_attribute
        values = []
        for which in (
            names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        ):
            got = self._driver.cuDeviceGetAttribute(which, self._device)
            (value,) = self._call("asking for the compute capability", got)
            values.append(int(value))
        return values[0], values[1]

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        """Makes the device's context that of this thread for a while."""
        self._call("entering the context", self._driver.cuCtxPushCurrent(self._context))
        try:
            yield
        finally:
            self._call("leaving the context", self._driver.cuCtxPopCurrent())

    def _get(self, name: str) -> int:
        attribute = getattr(self._driver.CUmemPool_attribute, f"CU_MEMPOOL_ATTR_{name}")
        got = self._driver.cuMemPoolGetAttribute(self._pool, attribute)
        (value,) = self._call(f"reading {name} of the memory pool", got)
        return int(value)

    def _set(self, name: str, value: int) -> None:
        attribute = getattr(self._driver.CUmemPool_attribute, f"CU_MEMPOOL_ATTR_{name}")
        self._call(
            f"setting {name} of the memory pool to {value}",
            self._driver.cuMemPoolSetAttribute(
                self._pool, attribute, self._driver.cuuint64_t(value)
            ),
        )

    def _call(self, what: str, result: tuple[Any, ...]) -> tuple[Any, ...]:
        return _checked(self._driver, f"{what} (GPU {self.ordinal})", result)


def _checked(driver: Any, what: str, result: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a call gave beside its return code, which has to be 0."""
    code, *values = result
    if int(code):
        raise CudaError(f"{what} failed: {_explain(driver, code)}")
    return tuple(values)


def _explain(driver: Any, code: Any) -> str:
    """A return code in the driver's own words."""
    words = []
    for ask in (driver.cuGetErrorName, driver.cuGetErrorString):
        failed, text = ask(code)
        if not int(failed) and text is not None:
            words.append(text.decode() if isinstance(text, bytes) else str(text))
    return ", ".join(words) or f"error {int(code)}"
