"""Messages that cannot be read: bytes that are no message, or text that is no UTF-8."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from ellm_jax.serving.errors import ErrorKind, ServiceError


class Malformed:
    """Stands for a message that could not be read.

    Attributes:
        error: what the client is told.
    """

    def __init__(self, cause: Exception):
        self.error = ServiceError(
            ErrorKind.INVALID,
            f"the message cannot be read ({cause}); texts have to be UTF-8",
        )


class ReadingGuard(grpc.aio.ServerInterceptor):
    """Hands the methods of one service a `Malformed` where gRPC would answer INTERNAL, as if the
    server were at fault."""

    def __init__(self, service: str):
        """`service`: its full name."""
        self._prefix = f"/{service}/"

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The method's handler, with a reader that cannot fail."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(self._prefix):
            return handler
        read = handler.request_deserializer

        def read_safely(data: bytes) -> Any:
            try:
                return read(data)
            except (DecodeError, ValueError) as error:
                return Malformed(error)

        return handler._replace(request_deserializer=read_safely)
