"""What the memory did and why: inflations, deflations, offloads and the like, one record each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

EventKind = Literal[
    "inflate", "deflate", "offload", "fetch", "evict", "preempt", "trim", "resize", "sleep", "wake"
]

_KEPT = 4096
"""Most events kept; the oldest go first. The counters go on."""


@dataclass(frozen=True, slots=True)
class MemoryEvent:
    """One move of memory.

    Attributes:
        time_s: when it ended, on the engine's monotonic clock.
        kind: "inflate": from activations to the KV cache. "deflate": from slots of ended requests
            and cached prefixes to activations. "offload", "fetch": KV to and from host memory.
            "evict": cached prefixes given up. "preempt": a request lost its KV and will compute
            it again. "trim": unused memory back to the system. "resize": a limit changed.
            "sleep", "wake": all of it given back, and taken again.
        bytes: how much moved.
        cause: what it was for.
        us: microseconds it took; for copies, from start to end on their own thread.
        request_id: whose memory, where it is one request's.
    """

    time_s: float
    kind: EventKind
    bytes: int
    cause: str
    us: float
    request_id: str | None = None


class EventLog:
    """Keeps the latest events and counts all. Appended to by one thread; read by any."""

    def __init__(self, clock: Callable[[], float]):
        """`clock` gives seconds, monotonic."""
        self.clock = clock
        self._events: deque[MemoryEvent] = deque(maxlen=_KEPT)
        self._totals: dict[str, tuple[int, int]] = {}

    def add(
        self,
        kind: EventKind,
        count_bytes: int,
        cause: str,
        begin_s: float,
        request_id: str | None = None,
    ) -> None:
        """Records a move that began at `begin_s` and has just ended."""
        now = self.clock()
        self._events.append(
            MemoryEvent(now, kind, count_bytes, cause, 1e6 * (now - begin_s), request_id)
        )
        count, total_bytes = self._totals.get(kind, (0, 0))
        self._totals[kind] = (count + 1, total_bytes + count_bytes)

    def totals(self) -> dict[str, tuple[int, int]]:
        """How many moves and bytes of each kind there were, together as of one moment."""
        return dict(self._totals)

    def reset_totals(self) -> None:
        """Counts from here on."""
        self._totals = {}

    def latest(self) -> list[MemoryEvent]:
        """The events kept, oldest first."""
        return list(self._events)
