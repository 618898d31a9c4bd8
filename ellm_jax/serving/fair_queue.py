"""Who is next: calls that wait for the engine, each tenant having the same share of its work.

Start-time fair queueing (Goyal, Vin, Cheng, 1996): every tenant has a clock that advances by the
cost of what it was given, and who is furthest behind is next. One that comes, or comes back, starts
at the clock of the one served last: idle time is not saved up.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(order=True)
class _Entry(Generic[T]):
    priority: int
    number: int
    item: T = field(compare=False)
    cost: float = field(compare=False)
    seats: int = field(compare=False)


@dataclass
class _Line(Generic[T]):
    clock: float
    seats: int = 0
    entries: list[_Entry[T]] = field(default_factory=list)  # the next one first


class FairQueue(Generic[T]):
    """A queue per tenant, ordered by priority, then by arrival.

    Attributes:
        seats: how many seats all that wait will take.
    """

    def __init__(self) -> None:
        self.seats = 0
        self._lines: dict[str, _Line[T]] = {}
        self._entries: dict[int, tuple[str, _Entry[T]]] = {}
        self._numbers = itertools.count()
        self._clock = 0.0

    def __len__(self) -> int:
        return len(self._entries)

    def push(self, tenant: str, item: T, priority: int, cost: float, seats: int) -> None:
        """Queues an item; its cost is what it will take of the engine, in any unit."""
        line = self._lines.get(tenant)
        if line is None:
            line = self._lines[tenant] = _Line(self._clock)
        entry = _Entry(priority, next(self._numbers), item, cost, seats)
        bisect.insort(line.entries, entry)
        line.seats += seats
        self.seats += seats
        self._entries[id(item)] = (tenant, entry)

    def peek_seats(self) -> int | None:
        """The seats of the next item; None if nothing waits."""
        tenant = self._next_tenant()
        return None if tenant is None else self._lines[tenant].entries[0].seats

    def pop(self) -> T:
        """Takes the next item out. There has to be one."""
        tenant = self._next_tenant()
        assert tenant is not None
        line = self._lines[tenant]
        entry = line.entries[0]
        self._clock = max(self._clock, line.clock)
        line.clock += entry.cost
        self._take_out(tenant, entry)
        return entry.item

    def charge(self, tenant: str, cost: float) -> None:
        """Adds to what a tenant was given, where the cost of an item that has left the queue turns
        out to be more, or less, than it was said to be."""
        line = self._lines.get(tenant)
        if line is None:
            if cost > 0:
                self._lines[tenant] = _Line(self._clock + cost)
            return
        line.clock += cost
        self._forget_if_idle(tenant)

    def remove(self, item: T) -> bool:
        """Takes an item out, wherever it stands; False if it does not wait."""
        found = self._entries.get(id(item))
        if found is None:
            return False
        self._take_out(*found)
        return True

    def newest_of_largest(self, tenant: str, seats: int) -> T | None:
        """Whose place a tenant may take in a full queue: the last of the tenant with most seats
        waiting, if that has more than this one would have with `seats` more."""
        waiting = self.waiting()
        largest = max(waiting, key=lambda name: waiting[name], default=tenant)
        mine = waiting.get(tenant, 0) + seats
        if largest == tenant or waiting[largest] - mine < 1:
            return None
        return self._lines[largest].entries[-1].item

    def waiting(self) -> Mapping[str, int]:
        """Seats that wait, by tenant."""
        return {name: line.seats for name, line in self._lines.items() if line.seats}

    def _next_tenant(self) -> str | None:
        lines = self._lines
        return min(
            (name for name, line in lines.items() if line.seats),
            key=lambda name: (lines[name].clock, lines[name].entries[0].number),
            default=None,
        )

    def _take_out(self, tenant: str, entry: _Entry[T]) -> None:
        del self._entries[id(entry.item)]
        line = self._lines[tenant]
        del line.entries[bisect.bisect_left(line.entries, entry)]
        line.seats -= entry.seats
        self.seats -= entry.seats
        self._forget_if_idle(tenant)

    def _forget_if_idle(self, tenant: str) -> None:
        line = self._lines[tenant]
        if not line.entries and line.clock <= self._clock:
            del self._lines[tenant]
