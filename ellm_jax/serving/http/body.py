"""Reads what a client sends, within bounds of size, time and depth, and checks it by a type."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from typing import TypeVar

import msgspec
from starlette.requests import Request

from ellm_jax.serving.http.errors import HttpError

BODY_TIMEOUT_S = 30.0
"""Longest time that a client may take to send a body of JSON."""

_PATH = re.compile(r" - at `\$\.?([^`]*)`$")
_UNKNOWN = re.compile(r"unknown field `([^`]*)`")
_MISSING = re.compile(r"missing required field `([^`]*)`")
_T = TypeVar("_T")


async def read_json(request: Request, decoder: msgspec.json.Decoder[_T], most_bytes: int) -> _T:
    """The body of a request.

    Raises:
        HttpError: it is too large or too slow, no JSON, too deep, or not what `decoder` wants.
        ClientDisconnect: the client has gone.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HttpError(415, f"content-type is {kind[:100]!r}; send application/json")
    chunks = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in bounded(request, most_bytes):
                chunks += chunk
    except TimeoutError as error:
        raise HttpError(
            408, f"the body did not come within {BODY_TIMEOUT_S:g} s; send it faster"
        ) from error
    return decode(bytes(chunks), decoder)


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
