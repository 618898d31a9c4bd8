"""Errors of the core as gRPC statuses, with the details that google.rpc has for them."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from ellm_jax.protocol.v1 import ellm_pb2
from ellm_jax.serving.errors import ErrorKind, ServiceError

DETAILS_KEY = "grpc-status-details-bin"
"""The metadata in which details of an error travel."""

DOMAIN = "ellm_jax"
"""Of the reasons in `ErrorInfo`."""

_MESSAGE_CHARS_MAX = 1000  # a status travels in headers, which clients take 8 KiB of

_SAMPLING = frozenset(field.name for field in ellm_pb2.Sampling.DESCRIPTOR.fields)

_CODES = {
    ErrorKind.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorKind.TOO_LARGE: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorKind.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    ErrorKind.FORBIDDEN: grpc.StatusCode.PERMISSION_DENIED,
    ErrorKind.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    ErrorKind.PRECONDITION: grpc.StatusCode.FAILED_PRECONDITION,
    ErrorKind.OVERLOADED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ErrorKind.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    ErrorKind.DEADLINE: grpc.StatusCode.DEADLINE_EXCEEDED,
    ErrorKind.CANCELLED: grpc.StatusCode.CANCELLED,
    ErrorKind.INTERNAL: grpc.StatusCode.INTERNAL,
}


def code_of(error: ServiceError) -> int:
    """The number of an error's status code, as in google.rpc.Code."""
    return int(_CODES[error.kind].value[0])


def message_of(error: ServiceError) -> str:
    """An error's message, cut to what a header holds."""
    text = error.message.encode("utf-8", "replace").decode()
    if len(text) <= _MESSAGE_CHARS_MAX:
        return text
    half = _MESSAGE_CHARS_MAX // 2
    return f"{text[:half]} ... {text[-half:]}"


def field_of(error: ServiceError) -> str:
    """The path of the field at fault in a GenerateRequest; empty where there is none."""
    if error.param is None:
        return ""
    return f"sampling.{error.param}" if error.param in _SAMPLING else error.param


def refusal(error: ServiceError) -> grpc.RpcMethodHandler:
    """A handler that ends every call with an error."""

    async def refuse(_: Any, context: grpc.aio.ServicerContext) -> None:
        await abort(context, error)

    # Of streams, so that it answers without waiting for a request, whatever the method's kind.
    return grpc.stream_stream_rpc_method_handler(refuse)


async def abort(context: grpc.aio.ServicerContext, error: ServiceError) -> NoReturn:
    """Ends a call with an error's status and details."""
    status = status_pb2.Status(code=code_of(error), message=message_of(error))
    info = error_details_pb2.ErrorInfo(reason=error.kind.name, domain=DOMAIN)
    details = [info]
    if error.kind in (ErrorKind.INVALID, ErrorKind.TOO_LARGE) and error.param is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=field_of(error), description=message_of(error)
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        nanos, seconds = math.modf(error.retry_after_s)
        delay = duration_pb2.Duration(seconds=int(seconds), nanos=int(nanos * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    await context.abort(
        _CODES[error.kind], status.message, ((DETAILS_KEY, status.SerializeToString()),)
    )
    raise AssertionError("abort returned")
