"""Which cores the engines run on, and how each is told to use so many threads."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "RAYON_NUM_THREADS",
)
_STAT = Path("/proc/stat")
_IDLE_COLUMNS = (3, 4)
"""Of a core's line in `_STAT`: idle, and idle with something to read from a disk."""

_SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def choose_cores(threads: int | None) -> list[int]:
    """Cores for so many threads, of those that this process may use; None: all of them. Whole
    cores first: two threads of one core share what they compute with.

    Raises:
        ValueError: there are fewer.
    """
    there = sorted(os.sched_getaffinity(0))
    wanted = len(there) if threads is None else threads
    if wanted > len(there):
        raise ValueError(
            f"threads={wanted}: this process may use {len(there)} cores; ask for that or less"
        )
    return sorted(sorted(there, key=lambda core: (_rank(core), core))[:wanted])


def _rank(core: int) -> int:
    """The place of a hardware thread among those of its core."""
    try:
        text = Path(_SIBLINGS.format(core)).read_text()
    except OSError:
        return 0
    return sum(other < core for other in _read_list(text))


def _read_list(text: str) -> list[int]:
    """Reads "0-3,8"."""
    cores: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        cores += range(int(first), int(last or first) + 1)
    return cores


def thread_variables(threads: int) -> dict[str, str]:
    """Environment variables that libraries take the number of threads from."""
    return dict.fromkeys(_THREAD_VARIABLES, str(threads))


def busy_share(cores: Sequence[int], watch_s: float = 0.5) -> float:
    """The share of these cores' time, from 0 to 1, that others take now; also what a hypervisor
    takes. Watches for a while, in which this process should do nothing."""
    before = _times(cores)
    time.sleep(watch_s)
    total, idle = (after - first for after, first in zip(_times(cores), before, strict=True))
    return 1 - idle / total if total > 0 else 0.0


def _times(cores: Sequence[int]) -> tuple[int, int]:
    """Ticks since the machine started, all and idle ones, summed over cores."""
    names = {f"cpu{core}" for core in cores}
    total = idle = 0
    for line in _STAT.read_text().splitlines():
        name, *columns = line.split()
        if name in names:
            ticks = [int(column) for column in columns[:8]]
            total += sum(ticks)
            idle += sum(ticks[column] for column in _IDLE_COLUMNS)
    return total, idle


def cpu_name() -> str:
    """What the processor calls itself; "unknown" where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"
