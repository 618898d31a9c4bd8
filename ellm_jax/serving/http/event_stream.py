"""Answers and server-sent events, as bytes that are made once."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ellm_jax.serving.errors import ServiceError
from ellm_jax.serving.http.disconnect import while_connected
from ellm_jax.serving.http.errors import HttpError, answer_of

_ENCODER = msgspec.json.Encoder()
DONE = b"data: [DONE]\n\n"


def reply(value: Any, status: int = 200) -> Response:
    """A whole answer in JSON."""
    return Response(_ENCODER.encode(value), status, media_type="application/json")


def event(value: Any) -> bytes:
    """A value as one event of a stream."""
    return b"data: " + _ENCODER.encode(value) + b"\n\n"


class EventStream(Response):
    """Sends events until there are no more, or the client goes: then their source is closed.

    The head of the answer goes out with the first event, so that what is refused before it has a
    status of its own. An error after that is an event, and the last one. Each event is taken from
    the source when the one before it was written: for a slow reader the source merges what comes.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]):
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it all."""
        await while_connected(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        async with contextlib.aclosing(self._events) as events:
            first = await anext(events)
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            await send({"type": "http.response.body", "body": first, "more_body": True})
            try:
                async for data in events:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            except (ServiceError, HttpError) as error:
                failed = {"error": answer_of(error).error}
                await send({"type": "http.response.body", "body": event(failed), "more_body": True})
            await send({"type": "http.response.body", "body": b""})
