"""What serving over HTTP costs: the same requests to the engine directly, and as streams.

    python scripts/bench_http.py MODEL [--requests 64] [--streams 500]

Measures, for one engine in one run: tokens per second of `generate` and of as many HTTP streams,
side by side and twice; what HTTP adds to the time to the first token of requests that come one by
one; and how long the event loop was not able to run while many streams are open. The clients are a
process of their own, which reads as cheaply as it can: on a small machine it takes its part of the
cores from the engine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

import uvloop

LAG_SAMPLE_S = 0.002
END = b"data: [DONE]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", help="directory of a checkpoint")
    parser.add_argument("--device-memory", default="4GiB")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--alone", type=int, default=20, help="requests that come one by one")
    parser.add_argument("--streams", type=int, default=500, help="concurrent ones, for the loop")
    parser.add_argument("--stream-tokens", type=int, default=16, help="of prompts and answers")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--client", metavar="PORT", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client is not None:
        asyncio.run(client(args.client))
    else:
        bench(args)


def bench(args: argparse.Namespace) -> None:
    from ellm_jax import Engine, EngineConfig, SamplingParams
    from ellm_jax.serving import collector

    config = EngineConfig(device_memory=args.device_memory, max_num_seqs=64, progress=False)
    with Engine.from_pretrained(args.model, config) as engine:
        vocab = engine.model_config.vocab_size
        params = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True)
        with Server(engine) as server, collector.settled():
            # Compiles what is measured afterwards.
            engine.generate(prompts(-1, args.requests, args.prompt_tokens, vocab), params)
            server.ask(prompts(-2, args.requests, args.prompt_tokens, vocab), 4, at_once=True)
            server.ask(prompts(-3, 2, args.prompt_tokens, vocab), 4, at_once=False)
            for count in range(args.rounds):
                compiled_s = engine.stats().compile_s
                work = prompts(2 * count, args.requests, args.prompt_tokens, vocab)
                begin_s = time.monotonic()
                engine.generate(work, params)
                direct_s = time.monotonic() - begin_s
                work = prompts(2 * count + 1, args.requests, args.prompt_tokens, vocab)
                http = server.ask(work, args.tokens, at_once=True)
                tokens = args.requests * args.tokens
                report(
                    f"{args.requests} requests",
                    generate_tok_s=tokens / direct_s,
                    http_tok_s=tokens / http["seconds"],
                    ratio=direct_s / http["seconds"],
                    failed=http["failed"],
                    compile_s=engine.stats().compile_s - compiled_s,
                )
            added(args, engine, server, vocab)
            server.lags.clear()
            work = prompts(99, args.streams, args.stream_tokens, vocab)
            http = server.ask(work, args.stream_tokens, at_once=True)
            report(
                f"{args.streams} streams",
                tok_s=args.streams * args.stream_tokens / http["seconds"],
                failed=http["failed"],
                loop_lag_p99_ms=1e3 * quantile(server.lags, 0.99),
                loop_lag_max_ms=1e3 * max(server.lags),
            )


def added(args: argparse.Namespace, engine: Any, server: Server, vocab: int) -> None:
    """What HTTP adds to the time to the first token."""
    from ellm_jax import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    direct = []
    for prompt in prompts(50, args.alone, args.prompt_tokens, vocab):
        begin_s = time.monotonic()
        outputs = engine.stream(prompt, params)
        next(outputs)
        direct.append(time.monotonic() - begin_s)
        list(outputs)
    work = prompts(51, args.alone, args.prompt_tokens, vocab)
    http = server.ask(work, 4, at_once=False)
    report(
        "one by one",
        ttft_p50_ms=1e3 * statistics.median(direct),
        http_ttft_p50_ms=1e3 * statistics.median(http["ttft_s"]),
        added_ms=1e3 * (statistics.median(http["ttft_s"]) - statistics.median(direct)),
    )


class Server:
    """The HTTP server on a thread, and a process of clients."""

    def __init__(self, engine: Any):
        self._engine = engine
        self._ready = threading.Event()
        self.lags: list[float] = []
        # The loop that `ellm serve` runs on.
        self._thread = threading.Thread(target=lambda: uvloop.run(self._serve()), daemon=True)

    def __enter__(self) -> Server:
        self._thread.start()
        assert self._ready.wait(60), "the server did not start"
        command = [sys.executable, "-P", __file__, "-", "--client", str(self._http.port)]
        self._client = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._client.stdin is not None
        self._client.stdin.close()
        self._client.wait(60)
        self._http.should_exit = True
        self._thread.join(60)

    def ask(self, work: list[list[int]], tokens: int, at_once: bool) -> dict[str, Any]:
        """Has the clients stream answers; seconds, failures and times to the first token."""
        assert self._client.stdin is not None
        assert self._client.stdout is not None
        bodies = [
            {
                "model": "m",
                "prompt": prompt,
                "max_tokens": tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
            }
            for prompt in work
        ]
        self._client.stdin.write(json.dumps({"bodies": bodies, "at_once": at_once}) + "\n")
        self._client.stdin.flush()
        result: dict[str, Any] = json.loads(self._client.stdout.readline())
        return result

    async def _serve(self) -> None:
        from ellm_jax.serving.http.app import make_app
        from ellm_jax.serving.http.server import HttpServer
        from ellm_jax.serving.service import Service
        from ellm_jax.serving.settings import ServeConfig
        from ellm_jax.serving.tenants import Keys

        config = ServeConfig(model_name="m", http="127.0.0.1:0")
        service = Service(self._engine, config)
        self._http = HttpServer(make_app(service, Keys(config), config), config)
        serving = asyncio.create_task(self._http.serve())
        watching = asyncio.create_task(self._watch())
        while not self._http.started:
            await asyncio.sleep(0.01)
        self._ready.set()
        await serving
        watching.cancel()
        await service.close()

    async def _watch(self) -> None:
        """Notes by how much the loop is late for a timer."""
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + LAG_SAMPLE_S
            await asyncio.sleep(LAG_SAMPLE_S)
            self.lags.append(loop.time() - due_s)


async def client(port: int) -> None:
    """Reads work from stdin, and writes what came of it to stdout."""
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        work = json.loads(line)
        whole = [request(json.dumps(body).encode()) for body in work["bodies"]]
        ttft_s: list[float] = []
        failed = 0
        begin_s = time.monotonic()
        if work["at_once"]:
            ended = await asyncio.gather(*(stream(port, each, ttft_s) for each in whole))
        else:
            ended = [await stream(port, each, ttft_s) for each in whole]
        failed = ended.count(False)
        seconds = time.monotonic() - begin_s
        print(json.dumps({"seconds": seconds, "failed": failed, "ttft_s": ttft_s}), flush=True)


def request(body: bytes) -> bytes:
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
    return f"{head}content-type: application/json\r\nconnection: close\r\n\r\n".encode() + body


async def stream(port: int, whole: bytes, ttft_s: list[float]) -> bool:
    """Sends a request and reads its stream; whether it came to its end."""
    begin_s = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(whole)
    tail, seen = b"", False
    while data := await reader.read(65536):
        if not seen and b"data: " in data:
            seen = True
            ttft_s.append(time.monotonic() - begin_s)
        tail = (tail + data)[-64:]
    writer.close()
    return END in tail


def prompts(seed: int, count: int, tokens: int, vocab: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, vocab) for _ in range(tokens)] for _ in range(count)]


def quantile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


def report(what: str, **figures: float) -> None:
    text = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    print(f"{what}: {text}", flush=True)


if __name__ == "__main__":
    main()
