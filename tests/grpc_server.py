"""A real gRPC server over a real engine, on a thread of its own, for tests of what it answers."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from engine_requests import wait_until
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from ellm_jax import Engine, EngineConfig
from ellm_jax.protocol.v1 import ellm_pb2 as pb
from ellm_jax.protocol.v1 import ellm_pb2_grpc
from ellm_jax.serving.grpc.server import GrpcServer
from ellm_jax.serving.observer import Observer
from ellm_jax.serving.run import Listening, serve
from ellm_jax.serving.service import Service
from ellm_jax.serving.settings import ServeConfig
from ellm_jax.serving.tenants import Keys

WAIT_S = 60.0
ADMIN_KEY = "admin-key-of-the-tests"


def checked_engine(**config: Any) -> Engine:
    """The package's small model; the ledger is checked after every step."""
    settings = {"device_memory": "64MiB", "max_num_seqs": 8, "warm_up": False, "progress": False}
    engine = Engine.from_pretrained(None, EngineConfig(**{**settings, **config}))
    loop = engine._loop
    step = loop.step

    def checked_step() -> bool:
        goes_on = step()
        loop.ledger.check()
        return goes_on

    loop.step = checked_step
    return engine


def wait_idle(engine: Engine) -> None:
    """Returns when no request is in the engine."""

    def idle() -> bool:
        load = engine.load()
        return not (load.running or load.waiting or load.moving or load.offloaded)

    wait_until(idle, WAIT_S)


def held_bytes(engine: Engine) -> dict[str, int]:
    """Bytes by owner once nothing runs and what nobody uses was given back."""
    wait_idle(engine)
    engine.trim()
    return engine.memory().by_owner()


class OnThread:
    """Runs a coroutine on a thread until it has ended.

    Attributes:
        result: what it returned; set by `join`.
    """

    def __init__(self, main: Callable[[], Any]):
        self.result: Any = None
        self._failure: BaseException | None = None
        self._ready = threading.Event()
        self._main = main
        self._thread = threading.Thread(target=self._run, name="test-server", daemon=True)

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(WAIT_S), "the server did not start"
        if self._failure is not None:
            raise self._failure

    def ready(self) -> None:
        self._ready.set()

    def join(self) -> Any:
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive(), "the server did not end"
        if self._failure is not None:
            raise self._failure
        return self.result

    def _run(self) -> None:
        try:
            self.result = asyncio.run(self._main())
        except BaseException as failure:
            self._failure = failure
        finally:
            self._ready.set()


class RunningGrpc:
    """Serves an engine until it is closed.

    Attributes:
        service: the core.
        address: where it is.
    """

    def __init__(self, engine: Engine, observer: Observer | None = None, **config: Any):
        self._observer = observer
        self._config = ServeConfig(**{"model_name": "small", "admin_key": ADMIN_KEY, **config})
        self._engine = engine
        self._thread = OnThread(self._serve)
        self._thread.start()

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self.service = Service(self._engine, self._config, self._observer)
        server = GrpcServer(self.service, Keys(self._config), self._config)
        try:
            self.address = f"127.0.0.1:{await server.start('127.0.0.1:0')}"
            self._thread.ready()
            await self._stop.wait()
        finally:
            await server.stop(0)
            await self.service.close()

    def call(self, function: Callable[[], Any]) -> Any:
        """Runs a function on the server's event loop; its result."""

        async def called() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(called(), self.loop).result(WAIT_S)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def __enter__(self) -> "RunningGrpc":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def stub(self) -> Iterator[Any]:
        """The official stub."""
        with grpc.insecure_channel(self.address) as channel:
            yield ellm_pb2_grpc.EngineServiceStub(channel)


class RunningServe:
    """The whole of `serve`, until it ends; `stop` is what a signal does.

    Attributes:
        addresses: where it is, by transport.
    """

    def __init__(self, engine: Engine, **config: Any):
        self._engine = engine
        self._config = ServeConfig(
            **{"model_name": "small", "grpc": "127.0.0.1:0", "log_level": "error", **config}
        )
        self._thread = OnThread(self._serve)
        self._thread.start()

    async def _serve(self) -> int:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()

        def listening(where: Listening) -> None:
            self.addresses = where.addresses
            self._thread.ready()

        return await serve(self._engine, self._config, on_listening=listening, stop=self._stop)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)

    def join(self) -> int:
        """Its exit code, once it has ended."""
        return int(self._thread.join())


def request(prompt: Any = "Once upon a time", *, request_id: str = "", **sampling: Any) -> Any:
    """A GenerateRequest; greedy unless said otherwise."""
    message = pb.GenerateRequest(
        sampling=pb.Sampling(**{"temperature": 0, **sampling}), request_id=request_id
    )
    if isinstance(prompt, str):
        message.text = prompt
    else:
        message.token_ids.ids.extend(prompt)
    return message


def endless(tokens: int = 1000, **sampling: Any) -> Any:
    """A request that takes a while."""
    return request([5, 6, 7], max_tokens=tokens, ignore_eos=True, **sampling)


def failure(call: Callable[[], object]) -> tuple[Any, dict[str, Any]]:
    """The error that a call ends with, and its details by the name of their kind."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    details: dict[str, Any] = {}
    status = rpc_status.from_call(caught.value)
    for packed in () if status is None else status.details:
        kind = getattr(error_details_pb2, packed.TypeName().rpartition(".")[2])
        detail = kind()
        assert packed.Unpack(detail)
        details[kind.DESCRIPTOR.name] = detail
    return caught.value, details
