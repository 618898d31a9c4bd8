"""Keeps a crowd that comes at once, or is told at once, from holding up the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

_T = TypeVar("_T", bound=Hashable)


class Turns:
    """Lets one through in each iteration of the event loop, in the order in which they came.

    To begin a request takes about a millisecond. Five hundred that begin in one iteration would
    keep timers and open streams waiting for half a second; so, those get their turn in between.
    Belongs to one event loop.
    """

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._taken = False

    async def wait(self) -> None:
        """Returns when it is one's turn; at once if nobody else came in this iteration."""
        loop = asyncio.get_running_loop()
        if not self._taken:
            self._taken = True
            loop.call_soon(self._next)
            return
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _next(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # else its request was given up
                turn.set_result(None)
                turn.get_loop().call_soon(self._next)
                return
        self._taken = False


class Gradually:
    """Calls so many functions in each iteration of the event loop, in the order in which they came.

    Belongs to one event loop.
    """

    def __init__(self, most: int):
        """Args:
        most: in one iteration.
        """
        self._most = self._left = most
        self._waiting: deque[Callable[[], None]] = deque()

    def call(self, loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
        """Calls a function; at once if there were not too many in this iteration."""
        if self._left == self._most:
            loop.call_soon(self._next, loop)
        if self._left > 0:
            self._left -= 1
            function()
        else:
            self._waiting.append(function)

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        self._left = self._most
        if self._waiting:
            loop.call_soon(self._next, loop)
        while self._waiting and self._left > 0:
            self._left -= 1
            self._waiting.popleft()()


class Spread(Generic[_T]):
    """Calls a function with each of many things, so many in an iteration of the event loop. A thing
    that is added while it waits keeps its place, so that no more wait than there are.

    Belongs to one event loop.
    """

    def __init__(self, most: int, each: Callable[[_T], None], settled: Callable[[], None]):
        """Args:
        most: in one iteration.
        each: called with a thing.
        settled: called when none waits any more.
        """
        self._most, self._each, self._settled = most, each, settled
        self._waiting: dict[_T, None] = {}
        self._scheduled = False

    def add(self, things: Iterable[_T]) -> None:
        """Has the function called with things: at once with the first, if none waits."""
        self._waiting |= dict.fromkeys(things)
        if not self._scheduled:
            self._scheduled = True
            self._next()

    def _next(self) -> None:
        # First, so that a call that fails keeps the others waiting for no more than an iteration.
        asyncio.get_running_loop().call_soon(self._go_on)
        for _ in range(min(self._most, len(self._waiting))):
            thing = next(iter(self._waiting))
            del self._waiting[thing]
            self._each(thing)

    def _go_on(self) -> None:
        self._scheduled = bool(self._waiting)
        if self._scheduled:
            self._next()
        else:
            self._settled()
