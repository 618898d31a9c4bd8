"""Time that passes only when something takes it."""

from __future__ import annotations


class FakeClock:
    """Called, it says how many seconds have passed since the world began."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def __call__(self) -> float:
        """The time."""
        return self._now_s

    def pass_time(self, seconds: float) -> None:
        """Lets so many seconds pass."""
        self._now_s += seconds

    def wait_until(self, time_s: float) -> None:
        """Lets time pass until then; none if that is past."""
        self._now_s = max(self._now_s, time_s)
