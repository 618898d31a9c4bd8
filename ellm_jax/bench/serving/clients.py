"""A process of streaming clients, which is told on standard input what to ask.

    python -P -m ellm_jax.bench.serving.clients http 127.0.0.1:8000

Reads as cheaply as it can, since on a small machine it takes its part of the cores from the engine:
requests are encoded before the clock starts, and answers are looked at when it has stopped.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from ellm_jax.protocol.v1 import ellm_pb2 as pb

_METHOD = "/ellm.v1.EngineService/GenerateStream"


@dataclass(frozen=True)
class Asked:
    """What came of a crowd of requests.

    Attributes:
        seconds: from the first request to the end of the last answer.
        failed: how many did not get a whole answer.
        ttft_s: from each request to its first token; of those that got one.
    """

    seconds: float
    failed: int
    ttft_s: list[float]


class ClientProcess:
    """A process of clients, started and asked by the benchmark."""

    def __init__(self, transport: str, address: str):
        """Starts it, for a server at an address."""
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, transport, address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    async def ask(self, prompts: list[list[int]], tokens: int, *, at_once: bool) -> Asked:
        """Has every prompt continued by so many tokens, streamed; all at once or one by one.

        Raises:
            RuntimeError: the process has ended.
        """
        work = {"prompts": prompts, "tokens": tokens, "at_once": at_once}
        line = await asyncio.to_thread(self._tell, json.dumps(work).encode() + b"\n")
        if not line:
            raise RuntimeError("the process of clients ended; what it wrote is above")
        return Asked(**json.loads(line))

    def _tell(self, line: bytes) -> bytes:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line)
        self._process.stdin.flush()
        return self._process.stdout.readline()

    def stop(self) -> None:
        """Ends it."""
        self._process.terminate()
        self._process.communicate()


class _Transport(Protocol):
    """How clients of one kind ask."""

    def encode(self, prompt: list[int], tokens: int) -> bytes: ...

    async def stream(self, request: bytes) -> tuple[float, bytes]:
        """Reads an answer; seconds to its first token, and its end."""
        ...

    def whole(self, end: bytes, tokens: int) -> bool: ...


class _Http:
    """A connection for each request, and HTTP no cleverer than our server's answers need."""

    def __init__(self, address: str):
        self._host, _, port = address.rpartition(":")
        self._port = int(port)

    def encode(self, prompt: list[int], tokens: int) -> bytes:
        asked = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        body = json.dumps(asked | {"ignore_eos": True, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        return f"{head}content-type: application/json\r\nconnection: close\r\n\r\n".encode() + body

    async def stream(self, request: bytes) -> tuple[float, bytes]:
        begin_s, first_s, end = time.monotonic(), 0.0, b""
        reader, writer = await asyncio.open_connection(self._host, self._port)
        writer.write(request)
        while data := await reader.read(65536):
            if not first_s and b"data: " in data:
                first_s = time.monotonic() - begin_s
            end = (end + data)[-64:]
        writer.close()
        return first_s, end

    def whole(self, end: bytes, tokens: int) -> bool:
        return b"data: [DONE]" in end


class _Grpc:
    """One connection for all, bytes in and bytes out."""

    def __init__(self, address: str):
        self._method = grpc.aio.insecure_channel(address).unary_stream(_METHOD)

    def encode(self, prompt: list[int], tokens: int) -> bytes:
        sampling = pb.Sampling(max_tokens=tokens, temperature=0, ignore_eos=True)
        ids = pb.TokenIds(ids=prompt)
        request: bytes = pb.GenerateRequest(token_ids=ids, sampling=sampling).SerializeToString()
        return request

    async def stream(self, request: bytes) -> tuple[float, bytes]:
        begin_s, first_s, end = time.monotonic(), 0.0, b""
        async for message in self._method(request):
            first_s = first_s or time.monotonic() - begin_s
            end = message
        return first_s, end

    def whole(self, end: bytes, tokens: int) -> bool:
        usage = pb.GenerateStreamResponse.FromString(end).usage
        return bool(usage.completion_tokens == tokens)


MODEL_NAME = "bench"
"""What the server has to call its model."""

TRANSPORTS: dict[str, type[_Http] | type[_Grpc]] = {"http": _Http, "grpc": _Grpc}
"""How clients can ask."""


async def _serve_stdin(transport: _Transport) -> None:
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(vars(await _ask(transport, **json.loads(line)))), flush=True)


async def _ask(
    transport: _Transport, prompts: list[list[int]], tokens: int, at_once: bool
) -> Asked:
    requests = [transport.encode(prompt, tokens) for prompt in prompts]
    begin_s = time.monotonic()
    if at_once:
        answers: list[Any] = await asyncio.gather(
            *(transport.stream(request) for request in requests), return_exceptions=True
        )
    else:
        answers = [await transport.stream(request) for request in requests]
    seconds = time.monotonic() - begin_s
    ended = [answer for answer in answers if not isinstance(answer, BaseException)]
    whole = sum(transport.whole(end, tokens) for _, end in ended)
    for error in (answer for answer in answers if isinstance(answer, BaseException)):
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    return Asked(seconds, len(requests) - whole, [first_s for first_s, _ in ended if first_s])


async def _main(transport: str, address: str) -> None:
    await _serve_stdin(TRANSPORTS[transport](address))


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
