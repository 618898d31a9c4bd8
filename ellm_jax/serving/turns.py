"""Keeps a crowd that comes at once from holding up the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable


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
