"""Streaming clients that cost next to nothing, so that what is measured is the server.

They know as much of HTTP and of HTTP/2 as our own server's answers need, keep bytes as they come,
and look at them when the clock has stopped: a message costs one of them a few microseconds, where
a general client takes some fifty from the engine's cores.
"""

from __future__ import annotations

import asyncio
import json
import struct
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol, cast

from ellm_jax.protocol.v1 import ellm_pb2 as pb

MODEL_NAME = "bench"
"""What the server has to call its model."""

_METHOD = b"/ellm.v1.EngineService/GenerateStream"


@dataclass
class Stream:
    """An answer on its way.

    Attributes:
        begin_s: when it was asked for.
        first_s: seconds to its first token; 0: there was none.
        data: all of it.
        ended: set when no more comes.
    """

    begin_s: float = field(default_factory=time.monotonic)
    first_s: float = 0.0
    data: bytearray = field(default_factory=bytearray)
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Asker(Protocol):
    """A way to ask a server."""

    def encode(self, prompt: list[int], tokens: int) -> bytes:
        """A request for so many tokens."""
        ...

    async def stream(self, request: bytes) -> Stream:
        """Sends a request, and returns when its answer is over."""
        ...

    def whole(self, stream: Stream, tokens: int) -> bool:
        """Whether an answer has so many tokens."""
        ...


class HttpAsker:
    """A connection for each request."""

    def __init__(self, address: str):
        self._host, _, port = address.rpartition(":")
        self._port = int(port)

    def encode(self, prompt: list[int], tokens: int) -> bytes:
        """As `Asker`."""
        asked = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        body = json.dumps(asked | {"ignore_eos": True, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        return f"{head}content-type: application/json\r\nconnection: close\r\n\r\n".encode() + body

    async def stream(self, request: bytes) -> Stream:
        """As `Asker`."""
        stream = Stream()
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(
            lambda: _HttpConnection(stream), self._host, self._port
        )
        transport.write(request)
        await stream.ended.wait()
        return stream

    def whole(self, stream: Stream, tokens: int) -> bool:
        """As `Asker`. Every token has an event, with the end's reason in the last one."""
        return b'"finish_reason":"length"' in stream.data and b"data: [DONE]" in stream.data[-64:]


class _HttpConnection(asyncio.Protocol):
    def __init__(self, stream: Stream):
        self._stream = stream

    def data_received(self, data: bytes) -> None:
        stream = self._stream
        if not stream.first_s and b"data: " in data:
            stream.first_s = time.monotonic() - stream.begin_s
        stream.data += data

    def connection_lost(self, exc: Exception | None) -> None:
        self._stream.ended.set()


class GrpcAsker:
    """One connection for all."""

    def __init__(self, address: str):
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._connection: _Http2Connection | None = None
        self._connecting = asyncio.Lock()

    def encode(self, prompt: list[int], tokens: int) -> bytes:
        """As `Asker`."""
        sampling = pb.Sampling(max_tokens=tokens, temperature=0, ignore_eos=True)
        ids = pb.TokenIds(ids=prompt)
        message: bytes = pb.GenerateRequest(token_ids=ids, sampling=sampling).SerializeToString()
        return struct.pack(">BI", 0, len(message)) + message

    async def stream(self, request: bytes) -> Stream:
        """As `Asker`."""
        stream = Stream()
        async with self._connecting:
            if self._connection is None:
                loop = asyncio.get_running_loop()
                _, self._connection = await loop.create_connection(
                    _Http2Connection, self._host, self._port
                )
        self._connection.ask(request, stream)
        await stream.ended.wait()
        return stream

    def whole(self, stream: Stream, tokens: int) -> bool:
        """As `Asker`."""
        messages = list(_messages(stream.data))
        if not messages:
            return False
        usage = pb.GenerateStreamResponse.FromString(messages[-1]).usage
        return bool(usage.completion_tokens == tokens)


def _messages(data: bytearray) -> Iterator[bytes]:
    """gRPC's messages, each behind a byte for compression and its length."""
    at = 0
    while at + 5 <= len(data):
        _, length = struct.unpack_from(">BI", data, at)
        yield bytes(data[at + 5 : at + 5 + length])
        at += 5 + length


_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4
_WINDOW, _MOST_WINDOW, _FRAME = 65535, 2**31 - 1, 16384
_SETTING_INITIAL_WINDOW = 4


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _literal(name: bytes, value: bytes) -> bytes:
    """A header that no table is asked for (RFC 7541, 6.2.2), both parts shorter than 127."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


_HEAD = b"".join(
    _literal(name, value)
    for name, value in (
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", _METHOD),
        (b":authority", b"bench"),
        (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
    )
)


class _Http2Connection(asyncio.Protocol):
    """The client's side of RFC 9113, as far as one kind of call needs it. What the server may send
    is unlimited; what it takes at a time is respected."""

    def __init__(self) -> None:
        self._streams: dict[int, Stream] = {}
        self._next = 1
        self._unread = b""
        self._window = _WINDOW
        self._queue: deque[tuple[int, bytes]] = deque()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's is one without being derived from it.
        self._transport = cast(asyncio.WriteTransport, transport)
        unlimited = struct.pack(">HI", _SETTING_INITIAL_WINDOW, _MOST_WINDOW)
        self._transport.write(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + _frame(_SETTINGS, 0, 0, unlimited)
            + _frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", _MOST_WINDOW - _WINDOW))
        )

    def ask(self, message: bytes, stream: Stream) -> None:
        """Sends a request; a stream's own window always holds one, that of all need not."""
        assert len(message) <= _WINDOW, "the request is longer than a stream's window"
        number, self._next = self._next, self._next + 2
        self._streams[number] = stream
        self._queue.append((number, message))
        self._send()

    def _send(self) -> None:
        while self._queue and len(self._queue[0][1]) <= self._window:
            number, message = self._queue.popleft()
            self._window -= len(message)
            frames = [_frame(_HEADERS, _END_HEADERS, number, _HEAD)]
            for at in range(0, len(message), _FRAME):
                last = at + _FRAME >= len(message)
                part = message[at : at + _FRAME]
                frames.append(_frame(_DATA, _END_STREAM if last else 0, number, part))
            self._transport.write(b"".join(frames))

    def data_received(self, data: bytes) -> None:
        data = self._unread + data
        at, size = 0, len(data)
        while at + 9 <= size:
            length = int.from_bytes(data[at : at + 3], "big")
            end = at + 9 + length
            if end > size:
                break
            number = int.from_bytes(data[at + 5 : at + 9], "big")
            self._take(data[at + 3], data[at + 4], number, data[at + 9 : end])
            at = end
        self._unread = data[at:]

    def _take(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        stream = self._streams.get(number)
        if kind == _DATA and stream is not None:
            if not stream.first_s:
                stream.first_s = time.monotonic() - stream.begin_s
            stream.data += payload
        elif kind == _SETTINGS and not flags & _ACK:
            self._transport.write(_frame(_SETTINGS, _ACK, 0, b""))
        elif kind == _PING and not flags & _ACK:
            self._transport.write(_frame(_PING, _ACK, 0, payload))
        elif kind == _WINDOW_UPDATE and number == 0:
            self._window += int.from_bytes(payload, "big")
            self._send()
        elif kind == _GOAWAY:
            self.connection_lost(None)
        over = kind == _RST_STREAM or (kind in (_DATA, _HEADERS) and flags & _END_STREAM)
        if over and stream is not None:
            del self._streams[number]
            stream.ended.set()

    def connection_lost(self, exc: Exception | None) -> None:
        for stream in self._streams.values():
            stream.ended.set()
        self._streams.clear()
