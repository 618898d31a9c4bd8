"""Resident memory of a process and all that it started, watched from outside."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

_PERIOD_S = 0.1
_PROC = Path("/proc")


def tree_pids(root: int) -> list[int]:
    """The process and its descendants that live, the root first."""
    found, reached = [], [root]
    while reached:
        pid = reached.pop()
        found.append(pid)
        # A process may end at any moment.
        with contextlib.suppress(OSError):
            for task in (_PROC / str(pid) / "task").iterdir():
                with contextlib.suppress(OSError):
                    reached += [int(child) for child in (task / "children").read_text().split()]
    return found


def resident_bytes(pid: int) -> tuple[int, int]:
    """Resident memory of one process, now and at most, in bytes; zeros when it has ended."""
    now, most = 0, 0
    with contextlib.suppress(OSError):
        for line in (_PROC / str(pid) / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                most = int(line.split()[1]) * 1024
            elif line.startswith("VmRSS:"):
                now = int(line.split()[1]) * 1024
    return now, most


class TreeMemory:
    """Watches a process tree from a thread until it is stopped.

    The peak is the highest sum that was sampled, but at least the highest mark of any one process,
    which the system keeps exactly: of a single process nothing is missed between two samples.
    Pages that several processes share count in each.
    """

    def __init__(self, pid: int):
        self._pid = pid
        self._peak_bytes = 0
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def peak_bytes(self) -> int:
        """The peak so far."""
        sizes = [resident_bytes(pid) for pid in tree_pids(self._pid)]
        total = sum(now for now, _ in sizes)
        with self._lock:
            self._peak_bytes = max(self._peak_bytes, total, *(most for _, most in sizes))
            return self._peak_bytes

    def stop(self) -> None:
        """Ends the watch."""
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(_PERIOD_S):
            self.peak_bytes()
