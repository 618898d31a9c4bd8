"""Bounds of connections and request heads, where uvicorn has none: below the application.

A client that sends its head slowly, or one without an end, or never reads its answer, costs nothing
but its connection, and that is taken back: at the latest when somebody else needs it.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from ellm_jax.serving.errors import ErrorKind, ServiceError
from ellm_jax.serving.http.errors import HttpError, answer_of
from ellm_jax.serving.settings import ServeConfig
from ellm_jax.serving.turns import Gradually

HEAD_TIMEOUT_S = 10.0
"""Longest time that a client may take to send the head of a request."""
MAX_HEADERS = 100
"""Most headers of a request."""
LINGER_S = 2.0
"""How long the rest of a body is read and thrown away, once its request has been answered."""
_BEGIN_MOST = 4  # connections whose heads are read in one iteration of the event loop


class _HeadTooLarge(Exception):
    pass


class BoundedProtocol(HttpToolsProtocol):
    """A connection."""

    bounds: ServeConfig
    """Set by `bounded_by`."""
    idle: dict[BoundedProtocol, None]
    """Those of the server that have no request, or half a head of one; longest first."""
    begin: Gradually
    """Has heads of requests taken: those of many that come at once in turns."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Takes a connection. Where there are too many, the one that has been idle longest goes;
        where all have requests, this one is refused."""
        super().connection_made(transport)
        self._in_head = False
        self._head_is_bad = False
        self._plain_bytes = 0  # of heads, chunk lines and trailers: what is no body
        self._body_read = True
        self._stall: asyncio.TimerHandle | None = None
        self._late: asyncio.TimerHandle | None = None
        most = self.bounds.max_connections
        if len(self.connections) > most and not self._drop_idlest():
            self._refuse(
                ServiceError(ErrorKind.UNAVAILABLE, f"{most} connections are open; come back later")
            )
            return
        self.idle[self] = None
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets it."""
        super().connection_lost(exc)
        self.idle.pop(self, None)
        for timer in (self._stall, self._late):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Takes what comes; what does not end is refused while it grows: a head, what a chunk says
        beside its length, and what comes after the last chunk."""
        if self not in self.idle:
            self._take(data)
            return
        self._unset_keepalive_if_required()
        self.flow.pause_reading()
        self.begin.call(self.loop, lambda: self._begin(data))

    def _begin(self, data: bytes) -> None:
        """Takes a head, or a piece of one."""
        if not self.transport.is_closing():
            self.flow.resume_reading()
            self._take(data)

    def _take(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._plain_bytes += len(data)
        super().data_received(data)
        if self._plain_bytes > self.bounds.max_header_bytes:
            self._refuse(self._head_error())

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._in_head, self._plain_bytes = True, 0
        if self._late is None:
            self._expect_head()

    def on_headers_complete(self) -> None:
        """A head has ended: the application is called, unless it is too large."""
        self._in_head = self._body_read = False
        self._plain_bytes = 0
        self.idle.pop(self, None)
        if self._late is not None:
            self._late.cancel()
            self._late = None
        head_bytes = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if head_bytes > self.bounds.max_header_bytes or len(self.headers) > MAX_HEADERS:
            self._head_is_bad = True
            raise _HeadTooLarge
        super().on_headers_complete()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer: nobody reads those."""
        if self._in_head:
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        """A piece of a body."""
        self._plain_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A body has ended."""
        self._body_read = True
        self._plain_bytes = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """An answer has ended; a client that still sends may do so for a moment."""
        super().on_response_complete()
        if self.cycle.response_complete and not self.transport.is_closing():
            self.idle[self] = None
        if not self._body_read:
            self.loop.call_later(LINGER_S, self._end_linger, self.cycle)

    def pause_writing(self) -> None:
        """The client does not read as fast as it is written to."""
        super().pause_writing()
        self._stall = self.loop.call_later(self.bounds.stall_s, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read."""
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def send_400_response(self, msg: str) -> None:
        """The head was none, or too large."""
        large = self._head_is_bad or self._plain_bytes > self.bounds.max_header_bytes
        self._refuse(self._head_error() if large else HttpError(400, "this is not HTTP; check it"))

    def _expect_head(self) -> None:
        self._late = self.loop.call_later(HEAD_TIMEOUT_S, self._head_is_late)

    def _head_is_late(self) -> None:
        self._late = None
        self._refuse(HttpError(408, f"no head of a request came within {HEAD_TIMEOUT_S:g} s"))

    def _head_error(self) -> HttpError:
        most = self.bounds.max_header_bytes
        return HttpError(
            431,
            f"a head may have {most} bytes and {MAX_HEADERS} headers; send less",
            code="too_large",
        )

    def _end_linger(self, cycle: Any) -> None:
        if self.cycle is cycle and not self._body_read:
            self.transport.close()

    def _drop_idlest(self) -> bool:
        """Hangs up on the connection that has had no request for longest; whether there was one."""
        idlest = next(iter(self.idle), None)
        if idlest is None:
            return False
        del self.idle[idlest]
        self.connections.discard(idlest)
        idlest.transport.abort()
        return True

    def _owes_another(self) -> bool:
        """Whether an answer now would be taken for that of an earlier request, or part of it."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            return False
        return bool(self.pipeline) or self._in_head or cycle.response_started

    def _refuse(self, error: ServiceError | HttpError) -> None:
        """Answers without the application, and hangs up."""
        if self.transport.is_closing():
            return
        self.idle.pop(self, None)
        if self._owes_another():
            self.transport.close()
            return
        answer = answer_of(error)
        head = [STATUS_LINE[answer.status], b"content-type: application/json\r\n"]
        head += [f"{name}: {value}\r\n".encode() for name, value in answer.headers.items()]
        head.append(b"content-length: %d\r\nconnection: close\r\n\r\n" % len(answer.body))
        self.transport.write(b"".join(head) + answer.body)
        self.transport.close()


def bounded_by(config: ServeConfig) -> type[BoundedProtocol]:
    """The protocol under the bounds of a configuration, as uvicorn takes it: a class."""
    own = {"bounds": config, "idle": {}, "begin": Gradually(_BEGIN_MOST)}
    return type("BoundedProtocol", (BoundedProtocol,), own)
