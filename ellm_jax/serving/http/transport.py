"""The HTTP server as the rest of a server's life knows its transports: started, then stopped."""

from __future__ import annotations

import asyncio
import contextlib
import socket

from starlette.types import ASGIApp

from ellm_jax.serving.http.server import HttpServer
from ellm_jax.serving.settings import ServeConfig, split_address

_POLL_S = 0.01


class HttpTransport:
    """Serves an application on one address."""

    def __init__(self, app: ASGIApp, config: ServeConfig):
        """As `HttpServer`."""
        self._server = HttpServer(app, config)
        self._serving: asyncio.Task[None] | None = None

    async def start(self, address: str) -> int:
        """Listens; the port, which the system chose where the address has 0.

        Raises:
            OSError: the address cannot be had.
            RuntimeError: the application did not start; the log says why.
        """
        host, port = split_address(address)
        try:
            bound = socket.create_server(
                (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
            )
        except OSError as error:
            raise OSError(
                f"HTTP cannot listen on {address}: {error.strerror}; choose another port"
            ) from error
        self._serving = asyncio.create_task(self._server.serve(sockets=[bound]))
        while not self._server.started:
            if self._serving.done():
                bound.close()
                self._serving.result()
                raise RuntimeError("the HTTP server did not start; its log says why")
            await asyncio.sleep(_POLL_S)
        return int(bound.getsockname()[1])

    async def stop(self, grace_s: float) -> None:
        """Takes no more connections, and ends those that are left after so many seconds."""
        if self._serving is None:
            return
        self._server.should_exit = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._serving), grace_s)
        self._server.force_exit = True
        await self._serving
