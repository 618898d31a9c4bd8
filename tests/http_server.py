"""A real HTTP server over a real engine, on a thread of its own, for tests of what it answers."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

import uvloop
from engine_requests import wait_until
from starlette.routing import BaseRoute

from ellm_jax import Engine
from ellm_jax.serving.http.app import make_app
from ellm_jax.serving.http.server import HttpServer
from ellm_jax.serving.observer import Observer
from ellm_jax.serving.service import Service
from ellm_jax.serving.settings import ServeConfig
from ellm_jax.serving.tenants import Keys
from ellm_jax.serving.watch import Watch

MODEL = "small"
START_S = 60.0


class RunningServer:
    """Serves an engine until it is closed.

    Attributes:
        engine, service, app: what it is made of.
        extra_paths: of the routes that are not the API's own.
        port, url: where it is.
    """

    def __init__(
        self,
        engine: Engine,
        extra_routes: Sequence[BaseRoute] = (),
        observers: Sequence[Observer] = (),
        **config: Any,
    ):
        self._observers = observers
        self.engine = engine
        self.config = ServeConfig(**{"model_name": MODEL, "http": "127.0.0.1:0", **config})
        self._extra_routes = extra_routes
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="test-server", daemon=True)
        self._thread.start()
        assert self._ready.wait(START_S), "the server did not start"
        if self._failure is not None:
            raise self._failure
        self.url = f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(START_S)
        assert not self._thread.is_alive(), "the server did not end"

    def __enter__(self) -> "RunningServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, function: Any) -> Any:
        """Runs a function on the server's event loop; its result."""
        done: Any = asyncio.run_coroutine_threadsafe(_called(function), self.loop)
        return done.result(START_S)

    def connect(self) -> socket.socket:
        """A bare connection, for what no client would send."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=START_S)

    def wait_idle(self) -> None:
        """Returns when no request is in the engine."""

        def idle() -> bool:
            load = self.engine.load()
            return not (load.running or load.waiting or load.moving or load.offloaded)

        wait_until(idle)

    def settled_bytes(self) -> dict[str, int]:
        """Bytes by owner once nothing runs and unused memory was given back."""
        self.wait_idle()
        self.engine.trim()
        memory = self.engine.memory()
        assert memory.kv_bytes == memory.activation_bytes == memory.available_bytes == 0, memory
        return memory.by_owner() | {"host": memory.host_used_bytes}

    def _run(self) -> None:
        try:
            uvloop.run(self._serve())
        except BaseException as failure:
            self._failure = failure
            self._ready.set()
            raise

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        watch = Watch(self.engine, MODEL, *self._observers)
        self.service = Service(self.engine, self.config, watch.observer)
        try:
            async with watch.looking_at(self.service) as routes:
                await self._listen([*routes, *self._extra_routes])
        finally:
            await self.service.close()

    async def _listen(self, extra_routes: Sequence[BaseRoute]) -> None:
        self.extra_paths = {getattr(route, "path", "") for route in extra_routes}
        self.app = make_app(self.service, Keys(self.config), self.config, extra_routes)
        self._server = HttpServer(self.app, self.config)
        serving = asyncio.create_task(self._server.serve())
        while not self._server.started:
            await asyncio.sleep(0.01)
            if serving.done():
                serving.result()
        self.port = self._server.port
        self._ready.set()
        await serving


async def _called(function: Any) -> Any:
    return function()


def request_bytes(method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
    """A request as it goes over the wire."""
    lines = [f"{method} {path} HTTP/1.1", "host: localhost", f"content-length: {len(body)}"]
    if body:
        headers.setdefault("content_type", "application/json")
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def read_reply(connection: socket.socket) -> tuple[int, Any]:
    """Status and JSON of a reply whose length is said."""
    data = b""
    end = time.monotonic() + START_S
    while b"\r\n\r\n" not in data:
        assert time.monotonic() < end, "no reply came"
        piece = connection.recv(65536)
        if not piece:
            raise ConnectionResetError(f"hung up after {data!r}")
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(
        int(line.split(b":")[1])
        for line in head.lower().split(b"\r\n")
        if line.startswith(b"content-length")
    )
    while len(body) < length:
        piece = connection.recv(65536)
        if not piece:
            raise ConnectionResetError("hung up")
        body += piece
    return int(head.split()[1]), json.loads(body[:length]) if length else None
