"""Which cores the engines run on, and how each is told to use so many threads."""

from __future__ import annotations

import os
from pathlib import Path

_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "RAYON_NUM_THREADS",
)
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


def cpu_name() -> str:
    """What the processor calls itself; "unknown" where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"
