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
from jax import lax

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


def large_temp(count_bytes: int) -> tuple[Callable[[], Any], int]:
    """A compiled step whose temporaries take about so many bytes; and what XLA says they take."""
    size = max(128, int((count_bytes / 2) ** 0.5) // 128 * 128)
    a = jax.random.normal(jax.random.key(0), (size, 64), jnp.bfloat16)
    b = jax.random.normal(jax.random.key(1), (64, size), jnp.bfloat16)

    def step(a: Any, b: Any) -> Any:
        # The square matrix has to be there as a whole: it is read by rows and by columns.
        square = jnp.tanh(a @ b)
        return (square @ a).sum() + (b @ square).sum()

    jitted = jax.jit(step)
    stated = jitted.lower(a, b).compile().memory_analysis()
    return lambda: jitted(a, b), int(stated.temp_size_in_bytes)


def long_work(seconds: float, *, small: bool) -> tuple[Callable[[Any], Any], Any, float]:
    """Something that keeps the device busy for about so long, compiled; its operand; and the
    seconds that it takes."""
    size, rounds = (64, 16) if small else (8192, 64)
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)

    def work(a: Any, rounds: int) -> Any:
        # A loop of a length that is known: the call does not wait for it.
        return lax.fori_loop(0, rounds, lambda _, x: jnp.tanh(a @ x), a)

    jitted = jax.jit(work, static_argnums=1)
    once_s = seconds_per_call(lambda: jitted(a, rounds), 1)
    wanted = rounds if small else max(1, round(rounds * seconds / once_s))
    took_s = seconds_per_call(lambda: jitted(a, wanted), 1, rounds=1)
    return lambda x: jitted(x, wanted), a, took_s


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
