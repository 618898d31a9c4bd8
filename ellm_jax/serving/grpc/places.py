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
_CHECK_S, _REQUEST_S = 5.0, 30.0
_Answer = Callable[[AsyncIterator[Any], grpc.aio.ServicerContext], Awaitable[None]]


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
        check = grpc.unary_unary_rpc_method_handler(
            servicer.Check,
            health_pb2.HealthCheckRequest.FromString,
            health_pb2.HealthCheckResponse.SerializeToString,
        )
        self._check = _streamed(check, _answering(check, _CHECK_S))

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
        return _streamed(handler, self._placed(kind, _answering(handler, _REQUEST_S)))

    def _placed(self, kind: str, answer: _Answer) -> _Answer:
        async def placed(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> None:
            if self._left[kind] <= 0:
                error = self._full(kind)
                tell_refused(
                    self._observer, error, tenant_of(self._keys, context.invocation_metadata())
                )
                await abort(context, error)
            self._left[kind] -= 1
            try:
                await answer(requests, context)
            finally:
                self._left[kind] += 1

        return placed

    def _full(self, kind: str) -> ServiceError:
        return ServiceError(
            ErrorKind.OVERLOADED,
            f"{self._most[kind]} {kind} run, and this server takes no more; try again later",
            retry_after_s=_RETRY_S,
        )


def _streamed(handler: Any, answer: _Answer) -> grpc.RpcMethodHandler:
    """A handler that answers so; clients see no difference."""
    return grpc.stream_stream_rpc_method_handler(
        answer, handler.request_deserializer, handler.response_serializer
    )


def _answering(handler: Any, request_s: float) -> _Answer:
    """What a handler of any kind does, as one that reads and writes streams. A single request has
    to come within so many seconds: until then the call has a place and gives nothing for it."""
    asked = "stream" if handler.request_streaming else "unary"
    method = getattr(handler, f"{asked}_{'stream' if handler.response_streaming else 'unary'}")

    async def answer(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> None:
        request = requests
        if not handler.request_streaming:
            request = await _only(requests, request_s, context)
        if inspect.isasyncgenfunction(method):
            async for message in method(request, context):
                await context.write(message)
            return
        message = await method(request, context)
        if not handler.response_streaming:
            await context.write(message)

    return answer


async def _only(
    requests: AsyncIterator[Any], within_s: float, context: grpc.aio.ServicerContext
) -> Any:
    """The request of a call that has one."""
    try:
        async with asyncio.timeout(within_s):
            request = await anext(requests, None)
        problem = "the call ended without a message"
    except TimeoutError:
        request, problem = None, f"no message came within {within_s:g} s"
    if request is None:
        await abort(context, ServiceError(ErrorKind.INVALID, f"{problem}; send one"))
    return request
