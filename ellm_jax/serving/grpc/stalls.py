"""Clients that do not read what they asked for."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from ellm_jax.serving.errors import ErrorKind, ServiceError


class Stalls:
    """Sends messages, and ends the calls of clients that have not read for too long.

    Looks at all calls now and then: a timer per message would cost more than what it guards.
    """

    def __init__(self, stall_s: float):
        """`stall_s`: seconds that a message may wait for its reader."""
        self._stall_s = stall_s
        self._since_s: dict[asyncio.Task[Any], float] = {}
        self._ended: set[asyncio.Task[Any]] = set()

    async def write(self, context: grpc.aio.ServicerContext, message: Any) -> None:
        """Sends a message, which waits while the client does not read.

        Raises:
            ServiceError: CANCELLED: that took too long.
        """
        task = asyncio.current_task()
        assert task is not None
        self._since_s[task] = task.get_loop().time()
        try:
            await context.write(message)
        except asyncio.CancelledError:
            if task not in self._ended:
                raise
            task.uncancel()
            raise ServiceError(
                ErrorKind.CANCELLED, f"nobody has read this stream for {self._stall_s:g} seconds"
            ) from None
        finally:
            del self._since_s[task]
            self._ended.discard(task)

    async def watch(self) -> None:
        """Looks after the calls until it is cancelled."""
        while True:
            await asyncio.sleep(max(0.05, self._stall_s / 4))
            late_s = asyncio.get_running_loop().time() - self._stall_s
            for task, since_s in self._since_s.items():
                if since_s < late_s and task not in self._ended:
                    self._ended.add(task)
                    task.cancel()
