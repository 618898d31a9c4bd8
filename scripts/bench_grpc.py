"""What serving over gRPC costs: the same requests to the engine directly, to the core of serving,
and as gRPC streams.

    python scripts/bench_grpc.py MODEL [--requests 64] [--streams 500]

Measures, for one engine in one run: tokens per second of `generate`, of the core without a
transport, and of as many gRPC streams, side by side in several rounds; what gRPC adds to the time
to the first token of requests that come one by one; and how late the event loop was while many
streams are open. The clients are a process of their own, which reads as cheaply as it can: on a
small machine it takes its part of the cores from the engine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from typing import Any

import grpc
import uvloop

from ellm_jax.protocol.v1 import ellm_pb2 as pb

LAG_SAMPLE_S = 0.002
METHOD = "/ellm.v1.EngineService/GenerateStream"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", help="directory of a checkpoint")
    parser.add_argument("--device-memory", default="4GiB")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--alone", type=int, default=20, help="requests that come one by one")
    parser.add_argument("--streams", type=int, default=500, help="concurrent ones, for the loop")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--client", metavar="PORT", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    uvloop.run(clients(args.client) if args.client is not None else bench(args))


async def bench(args: argparse.Namespace) -> None:
    from ellm_jax import Engine, EngineConfig
    from ellm_jax.serving import collector
    from ellm_jax.serving.grpc.server import GrpcServer
    from ellm_jax.serving.service import Service
    from ellm_jax.serving.settings import ServeConfig
    from ellm_jax.serving.tenants import Keys

    settings = EngineConfig(device_memory=args.device_memory, max_num_seqs=64, progress=False)
    with Engine.from_pretrained(args.model, settings) as engine:
        config = ServeConfig()
        service = Service(engine, config)
        server = GrpcServer(service, Keys(config), config)
        port = await server.start("127.0.0.1:0")
        asked = Clients()
        await asked.start(port)
        try:
            with collector.settled():
                await measure(args, engine, service, asked)
        finally:
            await asked.stop()
            await server.stop(0)
            await service.close()


async def measure(args: argparse.Namespace, engine: Any, service: Any, asked: Clients) -> None:
    from ellm_jax import SamplingParams

    seeds = iter(range(10**6))
    params = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True)

    def work(count: int) -> list[list[int]]:
        """Other prompts each time, so that none is found in the cache."""
        rng = random.Random(next(seeds))
        vocab = engine.model_config.vocab_size
        return [[rng.randrange(3, vocab) for _ in range(args.prompt_tokens)] for _ in range(count)]

    async def direct() -> float:
        prompts = work(args.requests)
        begin_s = time.monotonic()
        await asyncio.to_thread(engine.generate, prompts, params)
        return time.monotonic() - begin_s

    await direct()  # compiles what is measured afterwards
    await asked.ask(work(4), args.tokens, at_once=False)
    seconds: dict[str, list[float]] = {"generate": [], "core": [], "grpc": []}
    for _ in range(args.rounds):
        seconds["generate"].append(await direct())
        seconds["core"].append(await through_core(service, work(args.requests), params))
        answer = await asked.ask(work(args.requests), args.tokens, at_once=True)
        seconds["grpc"].append(answer["seconds"])
        tokens = args.requests * args.tokens
        report(
            f"{args.requests} requests", **{k: tokens / times[-1] for k, times in seconds.items()}
        )
    median = {name: statistics.median(times) for name, times in seconds.items()}
    report(
        "of generate's tokens per second",
        core=median["generate"] / median["core"],
        grpc=median["generate"] / median["grpc"],
    )

    alone = []
    for prompt in work(args.alone):
        begin_s = time.monotonic()
        await asyncio.to_thread(first_token, engine, prompt)
        alone.append(time.monotonic() - begin_s)
    answer = await asked.ask(work(args.alone), 4, at_once=False)
    ttft_ms, grpc_ms = (1e3 * statistics.median(each) for each in (alone, answer["ttft_s"]))
    report("first token, one by one", ms=ttft_ms, grpc_ms=grpc_ms, added_ms=grpc_ms - ttft_ms)

    lags: list[float] = []
    watching = asyncio.create_task(watch(lags))
    answer = await asked.ask(work(args.streams), 32, at_once=True)
    watching.cancel()
    report(
        f"{args.streams} streams",
        tok_s=args.streams * 32 / answer["seconds"],
        failed=answer["failed"],
        loop_late_p99_ms=1e3 * sorted(lags)[int(0.99 * (len(lags) - 1))],
        loop_late_max_ms=1e3 * max(lags),
    )


async def through_core(service: Any, prompts: list[list[int]], params: Any) -> float:
    from ellm_jax.serving.call import Call
    from ellm_jax.serving.tenants import Tenant

    tenant = Tenant("bench")

    async def read(prompt: list[int]) -> None:
        async with await service.open(Call(prompt, params, tenant)) as stream:
            async for _ in stream:
                pass

    begin_s = time.monotonic()
    await asyncio.gather(*map(read, prompts))
    return time.monotonic() - begin_s


def first_token(engine: Any, prompt: list[int]) -> None:
    from ellm_jax import SamplingParams

    outputs = engine.stream(prompt, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    next(outputs)
    outputs.close()


async def watch(lags: list[float]) -> None:
    """Notes by how much the loop is late for a timer."""
    loop = asyncio.get_running_loop()
    while True:
        due_s = loop.time() + LAG_SAMPLE_S
        await asyncio.sleep(LAG_SAMPLE_S)
        lags.append(loop.time() - due_s)


class Clients:
    """A process of clients, which is told what to ask on its standard input."""

    async def start(self, port: int) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", __file__, "-", "--client", str(port)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=2**24,
        )

    async def ask(self, prompts: list[list[int]], tokens: int, at_once: bool) -> dict[str, Any]:
        """Has answers streamed; seconds, failures and times to the first token."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = json.dumps({"prompts": prompts, "tokens": tokens, "at_once": at_once})
        self._process.stdin.write(line.encode() + b"\n")
        await self._process.stdin.drain()
        answer: dict[str, Any] = json.loads(await self._process.stdout.readline())
        return answer

    async def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()


async def clients(port: int) -> None:
    """Reads work from standard input, and writes what came of it to standard output."""
    loop = asyncio.get_running_loop()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        # Bytes in and out: what messages mean is looked at when the clock has stopped.
        method = channel.unary_stream(METHOD)
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            work = json.loads(line)
            sampling = pb.Sampling(max_tokens=work["tokens"], temperature=0, ignore_eos=True)
            asked = [
                pb.GenerateRequest(
                    token_ids=pb.TokenIds(ids=prompt), sampling=sampling
                ).SerializeToString()
                for prompt in work["prompts"]
            ]
            begin_s = time.monotonic()
            if work["at_once"]:
                ended = await asyncio.gather(*(read(method, each) for each in asked))
            else:
                ended = [await read(method, each) for each in asked]
            seconds = time.monotonic() - begin_s
            lasts = [pb.GenerateStreamResponse.FromString(last) for _, last in ended]
            failed = sum(last.usage.completion_tokens != work["tokens"] for last in lasts)
            answer = {"seconds": seconds, "failed": failed, "ttft_s": [first for first, _ in ended]}
            print(json.dumps(answer), flush=True)


async def read(method: Any, asked: bytes) -> tuple[float, bytes]:
    """Reads a stream; seconds to its first message, and its last one."""
    begin_s, first_s, last = time.monotonic(), 0.0, b""
    try:
        async for message in method(asked):
            first_s = first_s or time.monotonic() - begin_s
            last = message
    except grpc.aio.AioRpcError as error:
        print(error, file=sys.stderr)
    return first_s, last


def report(what: str, **figures: float) -> None:
    text = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    print(f"{what}: {text}", flush=True)


if __name__ == "__main__":
    main()
