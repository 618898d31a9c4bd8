"""A server's life: transports over one core, signals, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Protocol

from ellm_jax.engine import Engine
from ellm_jax.serving import collector
from ellm_jax.serving.grpc.server import GrpcServer
from ellm_jax.serving.http.app import make_app
from ellm_jax.serving.http.transport import HttpTransport
from ellm_jax.serving.observer import Observer
from ellm_jax.serving.service import Service, stopped
from ellm_jax.serving.settings import ServeConfig
from ellm_jax.serving.tenants import Keys
from ellm_jax.serving.tracing import tracing_to
from ellm_jax.serving.watch import Watch

_log = logging.getLogger(__name__)

_LAST_WORDS_S = 2.0
"""Seconds that transports have to tell clients of the end after it has come."""


class Transport(Protocol):
    """A server of some protocol over the core."""

    async def start(self, address: str) -> int:
        """Listens; the port."""
        ...

    async def stop(self, grace_s: float) -> None:
        """Takes no more calls, and ends those that are left after so many seconds."""
        ...


@dataclasses.dataclass(frozen=True)
class Listening:
    """Where a server can be reached.

    Attributes:
        addresses: "host:port" by transport, "grpc" and "http"; the ports that were really taken.
    """

    addresses: dict[str, str]


async def serve(
    engine: Engine,
    config: ServeConfig,
    *,
    observer: Observer | None = None,
    on_listening: Callable[[Listening], None] | None = None,
    stop: asyncio.Event | None = None,
) -> int:
    """Serves until it is told to stop, and returns the exit code of the process.

    SIGTERM and SIGINT, or `stop`, have it take no more calls and end when those there are have
    ended, or after `config.drain_s`. A second signal ends it at once. If the engine fails, every
    stream ends with an error, health turns red, and the server ends after `config.linger_s`.

    Args:
        engine: what to serve; not closed.
        config: addresses, keys and bounds.
        observer: is told of every call, beside metrics and log.
        on_listening: called once clients can come.
        stop: asks it to stop, as a signal does.

    Returns:
        0: stopped and all calls ended; 1: the engine failed; 130: stopped at once.

    Raises:
        OSError: an address cannot be had, or a file not be read.
        ValueError: there is no address, keys or certificates are none, or traces are asked for
            without the packages that send them.
    """
    if config.http is None and config.grpc is None:
        raise ValueError("there is no address; give http or grpc, as in grpc='127.0.0.1:50051'")
    addresses: dict[str, str] = {}
    async with contextlib.AsyncExitStack() as stack:
        observers = [] if observer is None else [observer]
        if config.trace_to is not None:
            observers.append(stack.enter_context(tracing_to(config.trace_to, engine)))
        watch = Watch(engine, config.model_name, *observers)
        service = Service(engine, config, watch.observer)
        keys = Keys(config)
        ending = _Ending(service, stop or asyncio.Event())
        # Last in, first out: streams end with an error before their connections are closed.
        stack.push_async_callback(service.close)
        routes = await stack.enter_async_context(watch.looking_at(service))
        if config.grpc is not None:
            grpc = GrpcServer(service, keys, config)
            addresses["grpc"] = await _listen(stack, grpc, config.grpc)
        if config.http is not None:
            http = HttpTransport(make_app(service, keys, config, routes), config)
            addresses["http"] = await _listen(stack, http, config.http)
        stack.callback(service.fail_all, stopped())
        stack.enter_context(ending.listening_to_signals())
        await stack.enter_async_context(collector.settled(engine))
        if on_listening is not None:
            on_listening(Listening(addresses))
        return await ending.wait()


async def _listen(stack: contextlib.AsyncExitStack, transport: Transport, address: str) -> str:
    port = await transport.start(address)
    stack.push_async_callback(transport.stop, _LAST_WORDS_S)
    return f"{address.rpartition(':')[0]}:{port}"


async def _first(*awaitables: Awaitable[object]) -> None:
    """Waits for the first of them; the others are cancelled."""
    tasks = [asyncio.ensure_future(each) for each in awaitables]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


class _Ending:
    """Waits for a reason to end, and gives calls the time to."""

    def __init__(self, service: Service, stop: asyncio.Event):
        self._service = service
        self._stop = stop
        self._at_once = asyncio.Event()
        self._failed = asyncio.Event()
        service.on_failure(self._failed.set)

    async def wait(self) -> int:
        """Returns the exit code."""
        await _first(self._stop.wait(), self._failed.wait())
        config = self._service.config
        if not self._failed.is_set():
            _log.info("stopping: open calls have %g s to end", config.drain_s)
            drained = asyncio.ensure_future(self._service.drain(config.drain_s))
            await _first(drained, self._at_once.wait(), self._failed.wait())
            if self._at_once.is_set():
                _log.warning("stopping at once: open calls end with an error")
                return 130
            if not self._failed.is_set():
                if cut := drained.result():
                    _log.warning("%d calls did not end in time", cut)
                return 0
        _log.error("the engine has failed: %s", self._service.engine.failure)
        await _first(self._stop.wait(), asyncio.sleep(config.linger_s))
        return 1

    @contextlib.contextmanager
    def listening_to_signals(self) -> Iterator[None]:
        """While it lasts, SIGTERM and SIGINT come here; in other threads than the main one nobody
        sends any."""
        loop = asyncio.get_running_loop()
        main = threading.current_thread() is threading.main_thread()
        signals = (signal.SIGTERM, signal.SIGINT) if main else ()
        for each in signals:
            loop.add_signal_handler(each, self._signalled)
        try:
            yield
        finally:
            for each in signals:
                loop.remove_signal_handler(each)

    def _signalled(self) -> None:
        if self._stop.is_set():
            self._at_once.set()
        self._stop.set()
