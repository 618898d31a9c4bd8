"""Reads what a client sends, within bounds of size, time and depth, and checks it by a type."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from typing import TypeVar

import msgspec
from starlette.requests import Request

from ellm_jax.serving.errors import ErrorKind, ServiceError
from ellm_jax.serving.http.errors import HttpError

BODY_TIMEOUT_S = 30.0
"""Longest time that a client may take to send a body of JSON."""

_BODIES_AT_ONCE = 64
"""All bodies that are being read may together have as many bytes as so many of the largest."""
_RETRY_S = 1.0

_PATH = re.compile(r" - at `\$\.?([^`]*)`$")
_UNKNOWN = re.compile(r"unknown field `([^`]*)`")
_MISSING = re.compile(r"missing required field `([^`]*)`")
_T = TypeVar("_T")


class Bodies:
    """Counts the bytes of all bodies that are being read, and refuses more than memory is for.

    Attributes:
        most_bytes: that bound.
        held_bytes: how many there are.
    """

    def __init__(self, max_body_bytes: int):
        """`max_body_bytes`: of one body."""
        self.most_bytes = _BODIES_AT_ONCE * max_body_bytes
        self.held_bytes = 0

    def take(self, count: int) -> None:
        """Counts more bytes.

        Raises:
            ServiceError: UNAVAILABLE: there are too many.
        """
        if self.held_bytes + count > self.most_bytes:
            raise ServiceError(
                ErrorKind.UNAVAILABLE,
                f"{self.held_bytes} bytes of bodies are being read, and this server holds "
                f"{self.most_bytes}; try again later",
                retry_after_s=_RETRY_S,
            )
        self.held_bytes += count


async def read_json(request: Request, decoder: msgspec.json.Decoder[_T], most_bytes: int) -> _T:
    """The body of a request.

    Raises:
        HttpError: it is too large or too slow, no JSON, too deep, or not what `decoder` wants.
        ServiceError: UNAVAILABLE: too many are being read.
        ClientDisconnect: the client has gone.
    """
    given = request.headers.get("content-type")
    kind = (given or "").partition(";")[0].strip().lower()
    if given is not None and kind != "application/json":
        raise HttpError(415, f"content-type is {kind[:100]!r}; send application/json")
    bodies: Bodies = request.app.state.bodies
    chunks = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in bounded(request, most_bytes):
                bodies.take(len(chunk))
                chunks += chunk
        if given is None:
            raise HttpError(415, "there is no content-type; send application/json")
        return decode(bytes(chunks), decoder)
    except TimeoutError as error:
        raise HttpError(
            408, f"the body did not come within {BODY_TIMEOUT_S:g} s; send it faster"
        ) from error
    finally:
        bodies.held_bytes -= len(chunks)


async def bounded(request: Request, most_bytes: int) -> AsyncGenerator[bytes, None]:
    """The pieces of a body; refuses one that says it is too large before reading any of it."""
    said = request.headers.get("content-length", "0")
    if said.isascii() and said.isdigit() and int(said) > most_bytes:
        raise _too_large(int(said), most_bytes)
    read_bytes = 0
    async for chunk in request.stream():
        read_bytes += len(chunk)
        if read_bytes > most_bytes:
            raise _too_large(read_bytes, most_bytes)
        yield chunk


def decode(body: bytes, decoder: msgspec.json.Decoder[_T]) -> _T:
    """What a text of JSON says.

    Raises:
        HttpError: it is no JSON, too deep, or not what `decoder` wants.
    """
    try:
        value = decoder.decode(body)
    except msgspec.ValidationError as error:
        message, param = _explain(str(error))
        raise HttpError(400, message, param=param) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise HttpError(400, f"the body is not JSON in UTF-8: {error}; check how it is made") from (
            error
        )
    except RecursionError as error:
        raise HttpError(400, "the JSON is nested too deep; flatten it") from error
    return value


def _explain(message: str) -> tuple[str, str | None]:
    """msgspec's message with the field that it is about."""
    path = _PATH.search(message)
    named = _UNKNOWN.search(message) or _MISSING.search(message)
    where = path[1] if path else ""
    if named is not None:
        where = f"{where}.{named[1]}".lstrip(".")
    return f"{message}; see /openapi.json", where or None


def _too_large(size: int, most_bytes: int) -> HttpError:
    return HttpError(
        413,
        f"the body has {size} bytes or more and the limit is {most_bytes}; send less",
        code="too_large",
    )
