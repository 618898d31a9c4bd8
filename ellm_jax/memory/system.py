"""What the machine has: memory free for an engine that was given no limit."""

from __future__ import annotations

import pathlib

MARGIN = 0.1
"""Share of the free memory that is left to the rest of the machine."""


def _cgroup_room_bytes() -> int | None:
    """What the process's memory control group still allows; None where there is no limit."""
    root = pathlib.Path("/sys/fs/cgroup")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            return int((root / limit).read_text()) - int((root / used).read_text())
        except (OSError, ValueError):
            continue
    return None


def free_memory_bytes() -> int:
    """Memory that a new process could take without swapping."""
    for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
            break
    else:
        raise RuntimeError("/proc/meminfo does not say MemAvailable; set device_memory")
    room = _cgroup_room_bytes()
    return available if room is None else min(available, room)


def default_limit_bytes() -> int:
    """The limit of an engine that was given none: what is free now, less a tenth."""
    return int(free_memory_bytes() * (1 - MARGIN))
