"""Who owned the memory when: samples of a running engine, and the events between them."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Any, Protocol

from ellm_jax.memory.report import MemoryReport

_PERIOD_S = 0.02
_MAX_SAMPLES = 4000


class Sampled(Protocol):
    """What is needed of an engine."""

    def memory(self) -> MemoryReport:
        """Bytes by owner, from any thread."""


class Timeline:
    """Samples `engine.memory()` on a thread of its own, as a context manager.

    A long run has its samples thinned out and taken less often, so that there are never more than
    some thousand.
    """

    def __init__(self, engine: Sampled, period_s: float = _PERIOD_S):
        """Args:
        engine: open for as long as this is entered.
        period_s: seconds between samples at first.
        """
        self._engine = engine
        self._period_s = period_s
        self._samples: list[tuple[float, MemoryReport]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ellm-timeline", daemon=True)

    def __enter__(self) -> Timeline:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._take()

    def to_dict(self, start_s: float) -> dict[str, Any]:
        """Columns for JSON: `time_s` since `start_s` (of the monotonic clock), `owners` (bytes per
        owner), `host_bytes` (used in the host tier), `limit_bytes`, `host_limit_bytes`."""
        owners = self._samples[0][1].by_owner()
        return {
            "time_s": [round(at_s - start_s, 4) for at_s, _ in self._samples],
            "owners": {
                owner: [report.by_owner()[owner] for _, report in self._samples] for owner in owners
            },
            "limit_bytes": [report.limit_bytes for _, report in self._samples],
            "host_bytes": [report.host_used_bytes for _, report in self._samples],
            "host_limit_bytes": [report.host_limit_bytes for _, report in self._samples],
        }

    def _run(self) -> None:
        while not self._ended.is_set():
            self._take()
            if len(self._samples) > _MAX_SAMPLES:
                del self._samples[1::2]
                self._period_s *= 2
            self._ended.wait(self._period_s)

    def _take(self) -> None:
        self._samples.append((time.monotonic(), self._engine.memory()))
