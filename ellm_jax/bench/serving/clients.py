"""A process of streaming clients, which is told on standard input what to ask.

    python -P -m ellm_jax.bench.serving.clients http 127.0.0.1:8000

On a small machine it takes its part of the cores from the engine, so it does as little as it can:
requests are encoded before the clock starts, and answers are looked at when it has stopped.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from dataclasses import dataclass

import uvloop

from ellm_jax.bench.serving.streams import Asker, GrpcAsker, HttpAsker


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

    async def ask(self, prompts: list[list[int]], tokens: list[int], *, at_once: bool) -> Asked:
        """Has each prompt continued by its number of tokens, streamed; all at once or one by one.

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


_ASKERS: dict[str, type[HttpAsker] | type[GrpcAsker]] = {"http": HttpAsker, "grpc": GrpcAsker}


async def _serve_stdin(asker: Asker) -> None:
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(vars(await _ask(asker, **json.loads(line)))), flush=True)


async def _ask(asker: Asker, prompts: list[list[int]], tokens: list[int], at_once: bool) -> Asked:
    requests = [asker.encode(*each) for each in zip(prompts, tokens, strict=True)]
    begin_s = time.monotonic()
    if at_once:
        streams = await asyncio.gather(*map(asker.stream, requests))
    else:
        streams = [await asker.stream(request) for request in requests]
    seconds = time.monotonic() - begin_s
    whole = sum(asker.whole(*each) for each in zip(streams, tokens, strict=True))
    ttft_s = [stream.first_s for stream in streams if stream.first_s]
    return Asked(seconds, len(requests) - whole, ttft_s)


if __name__ == "__main__":
    uvloop.run(_serve_stdin(_ASKERS[sys.argv[1]](sys.argv[2])))
