"""Keeps a crowd that comes at once from holding up the event loop."""

from __future__ import annotations

import asyncio
from collections import deque


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
