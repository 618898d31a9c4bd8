"""What was promised about latency, and how far it lets the host tier be filled."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True)
class SloTargets:
    """Latency targets; None where nothing was promised.

    Attributes:
        ttft_ms: milliseconds from arrival to the first token.
        tpot_ms: mean milliseconds per token after the first.
    """

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    def __post_init__(self) -> None:
        for name in ("ttft_ms", "tpot_ms"):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise TypeError(f"{name}={value!r}: must be a number of milliseconds, or None")
            if not 0 < value < math.inf:
                raise ValueError(
                    f"{name}={value!r}: must be above 0 milliseconds; use None for no target"
                )


class SloBuffer:
    """The logical size of the host tier: what of the physical one new prompts may take.

    eLLM, "SLO-aware buffer scaling": exceeding the target for time per output token
    makes it smaller, so that fewer prompts are prefilled; exceeding that for the time to first
    token makes it larger. An event is a target exceeded in `violations` of the last `window`
    iterations; TPOT is judged first, and an event clears the window. What already lies in the
    buffer beyond a smaller size stays there: only what comes next is refused.

    Attributes:
        limit_bytes: the logical size; starts at the physical one.
        physical_bytes: the most it can be.
        smallest_bytes: the least it can be, as far as the physical size allows.
    """

    def __init__(
        self,
        physical_bytes: int,
        smallest_bytes: int,
        window: int = 5,
        violations: int = 3,
        factor: float = 2.0,
    ):
        """Args:
        physical_bytes: the host tier's size.
        smallest_bytes: a bound from below, such as the KV of one request.
        window: iterations that are looked at.
        violations: how many of them exceed a target in an event.
        factor: what an event multiplies or divides the size by.

        Raises:
            ValueError: more violations than iterations, a factor of 1 or less, or a size below 0.
        """
        if not 1 <= violations <= window:
            raise ValueError(f"{violations} violations in a window of {window}; give 1 to {window}")
        if not 1 < factor < math.inf:
            raise ValueError(f"a factor of {factor} scales nothing; give one above 1")
        if physical_bytes < 0 or smallest_bytes < 0:
            raise ValueError(
                f"sizes of {physical_bytes} and {smallest_bytes} bytes; give 0 or more"
            )
        self.physical_bytes = physical_bytes
        self.smallest_bytes = smallest_bytes
        self.limit_bytes = physical_bytes
        self._violations = violations
        self._factor = factor
        self._exceeded: deque[tuple[bool, bool]] = deque(maxlen=window)

    def observe(self, ttft_exceeded: bool, tpot_exceeded: bool) -> None:
        """Takes in one iteration: whether some request exceeded its target."""
        self._exceeded.append((ttft_exceeded, tpot_exceeded))
        ttft = sum(each[0] for each in self._exceeded)
        tpot = sum(each[1] for each in self._exceeded)
        if tpot >= self._violations:
            self._scale(1 / self._factor)
        elif ttft >= self._violations:
            self._scale(self._factor)

    def resize(self, physical_bytes: int) -> None:
        """Takes in a new physical size; the logical one keeps its share of it."""
        old, self.physical_bytes = self.physical_bytes, physical_bytes
        share = self.limit_bytes / old if old else 1.0
        self.limit_bytes = self._bounded(physical_bytes * share)

    def _scale(self, by: float) -> None:
        self.limit_bytes = self._bounded(self.limit_bytes * by)
        self._exceeded.clear()

    def _bounded(self, size: float) -> int:
        return min(self.physical_bytes, max(self.smallest_bytes, int(size)))
