"""The ceilings of the machine, and what others see of its memory."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ellm_jax.memory.device_pool import DevicePool

_ROUNDS = 5


def seconds_per_call(call: Callable[[], Any], calls: int, rounds: int = _ROUNDS) -> float:
    """Median over rounds of the time of one call among many that follow each other on the device,
    after two calls that do not count. `call` returns arrays of the device."""
    jax.block_until_ready([call(), call()])
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        last = None
        for _ in range(calls):
            last = call()
        jax.block_until_ready(last)
        times.append((time.perf_counter() - begin) / calls)
    return statistics.median(times)


def copy_bandwidth(count_bytes: int) -> float:
    """Bytes read and written per second by a kernel that does nothing else."""
    source = jax.random.bits(jax.random.key(0), (count_bytes // 4,), jnp.uint32)
    copy = jax.jit(lambda x: x ^ 1)
    seconds = seconds_per_call(lambda: copy(source), 8)
    return 2 * count_bytes / seconds


def matrix_rate(size: int) -> float:
    """Operations per second of a square bfloat16 matrix product on random data."""
    a, b = (jax.random.normal(jax.random.key(seed), (size, size), jnp.bfloat16) for seed in (1, 2))
    multiply = jax.jit(lambda a, b: a @ b)
    return 2.0 * size**3 / seconds_per_call(lambda: multiply(a, b), 8)


class DeviceMemory:
    """What the machine says is taken of the device's memory: by all programs on a GPU, by this
    process on a CPU."""

    def __init__(self, pool: DevicePool | None):
        """Takes the pool of the GPU; None for the CPU."""
        self._pool = pool

    def used_bytes(self) -> int:
        """As nvidia-smi counts it, or the resident memory."""
        if self._pool is not None:
            free, total = self._pool.memory_info()
            return total - free
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError("/proc/self/status says no VmRSS")


class Watch:
    """Samples memory on a thread while it is entered.

    Attributes:
        samples: seconds since the start, and bytes.
    """

    def __init__(self, memory: DeviceMemory, period_s: float = 0.002):
        """Samples so often, if the driver answers so quickly."""
        self._memory = memory
        self._period_s = period_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.begin_s = 0.0
        self.samples: list[tuple[float, int]] = []

    def __enter__(self) -> Watch:
        self.begin_s = time.monotonic()
        self._take()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._take()

    @property
    def peak_bytes(self) -> int:
        """The most that was seen."""
        return max(used for _, used in self.samples)

    def _run(self) -> None:
        while not self._over.wait(self._period_s):
            self._take()

    def _take(self) -> None:
        self.samples.append((time.monotonic() - self.begin_s, self._memory.used_bytes()))


def nvidia_smi(fields: str) -> str:
    """What nvidia-smi says of the first GPU; "" where there is none of it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    said = subprocess.run(
        [tool, f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        check=False,
    )
    return said.stdout.strip().splitlines()[0] if said.stdout.strip() else ""


def machine() -> dict[str, Any]:
    """What was measured on."""
    device = jax.devices()[0]
    return {
        "jax": jax.__version__,
        "device": device.device_kind,
        "platform": device.platform,
        "client": device.client.platform_version,
        "nvidia_smi": nvidia_smi("name,driver_version,memory.total"),
    }
