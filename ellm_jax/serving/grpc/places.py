"""How many gRPC calls run at a time, so that there is always a place for a health check."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2

from ellm_jax.serving.errors import ErrorKind, ServiceError
from ellm_jax.serving.grpc.keys import CHECK, tenant_of
from ellm_jax.serving.grpc.status import abort
from ellm_jax.serving.observer import Observer, tell_refused
from ellm_jax.serving.tenants import Keys

WATCH = "/grpc.health.v1.Health/Watch"
WATCHES_MAX = 32
"""Most calls of `WATCH` at a time."""
SPARE = 64
"""Places of the server that only refusals and health checks take."""

_RETRY_S = 1.0
_CHECK_S = 5.0


class Places(grpc.aio.ServerInterceptor):
    """Refuses calls above a bound, and answers checks of health, which need no place."""

    def __init__(
        self, most: int, keys: Keys, observer: Observer, servicer: health.aio.HealthServicer
    ):
        """Takes the most calls at a time, who makes them, who is told of refusals, and what knows
        the health."""
        self._keys = keys
        self._left = {"calls": most, "watches of health": WATCHES_MAX}
        self._most = dict(self._left)
        self._observer = observer
        self._check = _patient_check(servicer)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The method's handler, which takes a place while it runs."""
        method = handler_call_details.method
        if method == CHECK:
            return self._check
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        kind = "watches of health" if method == WATCH else "calls"
        name = _field(handler)
        return handler._replace(**{name: self._placed(kind, getattr(handler, name))})

    def _placed(self, kind: str, method: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
        async def placed(request: Any, context: grpc.aio.ServicerContext) -> Any:
            if self._left[kind] <= 0:
                error = self._full(kind)
                tell_refused(
                    self._observer, error, tenant_of(self._keys, context.invocation_metadata())
                )
                await abort(context, error)
            self._left[kind] -= 1
            try:
                if not inspect.isasyncgenfunction(method):
                    return await method(request, context)
                async for message in method(request, context):
                    await context.write(message)
            finally:
                self._left[kind] += 1

        return placed

    def _full(self, kind: str) -> ServiceError:
        return ServiceError(
            ErrorKind.OVERLOADED,
            f"{self._most[kind]} {kind} run, and this server takes no more; try again later",
            retry_after_s=_RETRY_S,
        )


def _field(handler: Any) -> str:
    """Where a handler has its method."""
    asked = "stream" if handler.request_streaming else "unary"
    return f"{asked}_{'stream' if handler.response_streaming else 'unary'}"


def _patient_check(servicer: health.aio.HealthServicer) -> grpc.RpcMethodHandler:
    """Answers `CHECK`, but does not wait for a request for ever: nobody needs a key to open it."""

    async def check(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> None:
        try:
            async with asyncio.timeout(_CHECK_S):
                request = await anext(requests, None)
        except TimeoutError:
            request = None
        if request is None:
            message = f"no message came within {_CHECK_S:g} s; send one"
            await abort(context, ServiceError(ErrorKind.INVALID, message))
        await context.write(await servicer.Check(request, context))

    return grpc.stream_stream_rpc_method_handler(
        check,
        health_pb2.HealthCheckRequest.FromString,
        health_pb2.HealthCheckResponse.SerializeToString,
    )
