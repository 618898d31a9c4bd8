"""The latencies of the last calls, as the dashboard shows them."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable

_KEPT = 4096


class Latencies:
    """TTFT and TPOT in milliseconds, each with when it was known. Bounded; used on one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        """`clock` gives seconds, monotonic."""
        self._clock = clock
        self._ttft: deque[tuple[float, float]] = deque(maxlen=_KEPT)
        self._tpot: deque[tuple[float, float]] = deque(maxlen=_KEPT)

    def add_ttft(self, ms: float) -> None:
        """A call has its first token."""
        self._ttft.append((self._clock(), ms))

    def add_tpot(self, ms: float) -> None:
        """A call is over."""
        self._tpot.append((self._clock(), ms))

    def ttft_ms(self, seconds: float) -> tuple[float, float] | None:
        """Median and 95th percentile over the last `seconds`; None: no call in them."""
        return self._percentiles(self._ttft, seconds)

    def tpot_ms(self, seconds: float) -> tuple[float, float] | None:
        """As `ttft_ms`."""
        return self._percentiles(self._tpot, seconds)

    def _percentiles(
        self, kept: deque[tuple[float, float]], seconds: float
    ) -> tuple[float, float] | None:
        since = self._clock() - seconds
        values = []
        for when, ms in reversed(kept):
            if when < since:
                break
            values.append(ms)
        if not values:
            return None
        if len(values) == 1:
            return values[0], values[0]
        cuts = statistics.quantiles(values, n=20, method="inclusive")
        return cuts[9], cuts[18]
