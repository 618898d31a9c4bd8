"""Throughput, time to first token and the event loop of a server, beside its engine alone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ellm_jax.bench.measure import Spread, median_of
from ellm_jax.bench.peers.tree_memory import resident_bytes
from ellm_jax.bench.serving.clients import ClientProcess
from ellm_jax.bench.serving.streams import MODEL_NAME
from ellm_jax.bench.tables import Row, columns
from ellm_jax.config import format_bytes
from ellm_jax.engine import Engine
from ellm_jax.sampling import SamplingParams
from ellm_jax.serving.run import Listening, serve
from ellm_jax.serving.settings import ServeConfig

DIRECT = "generate"
"""What the side is called that is no server: `Engine.generate`."""

_LAG_SAMPLE_S = 0.002
_MEMORY_SAMPLE_S = 0.1
_FEW_TOKENS = 4
_ANY_PORT = "127.0.0.1:0"


@dataclass(frozen=True)
class Work:
    """What is asked.

    Attributes:
        requests: how many at once, for throughput.
        prompt_len, output_len: least and most tokens of each of them.
        alone: how many one by one, for the time to the first token.
        alone_tokens: of the prompt of each of those.
        streams: how many at once, for the event loop and memory.
        stream_tokens: of each of those, prompt and answer.
        seed: of the prompts.
    """

    requests: int = 64
    prompt_len: tuple[int, int] = (32, 512)
    output_len: tuple[int, int] = (16, 256)
    alone: int = 30
    alone_tokens: int = 128
    streams: int = 500
    stream_tokens: int = 32
    seed: int = 0


class _Crowds:
    """Requests of the same lengths in every round, with other tokens, so that no prompt is found in
    the cache."""

    def __init__(self, vocab: int, work: Work):
        self._vocab, self._random = vocab, random.Random(work.seed)
        self._lengths = [
            (self._random.randint(*work.prompt_len), self._random.randint(*work.output_len))
            for _ in range(work.requests)
        ]

    def workload(self) -> tuple[list[list[int]], list[int]]:
        """The prompts of a round, and the tokens of their answers."""
        prompts, outputs = zip(*self._lengths, strict=True)
        return [self._prompt(tokens) for tokens in prompts], list(outputs)

    def make(self, count: int, tokens: int) -> list[list[int]]:
        """Prompts of a length."""
        return [self._prompt(tokens) for _ in range(count)]

    def _prompt(self, tokens: int) -> list[int]:
        return [self._random.randrange(3, self._vocab) for _ in range(tokens)]


@dataclass
class _Watched:
    """What was seen while a crowd was served.

    Attributes:
        late_s: by how much each timer of the event loop was late.
        physical_bytes: of the engine's memory, in each sample.
    """

    late_s: list[float] = field(default_factory=list)
    physical_bytes: list[int] = field(default_factory=list)


async def measure_serving(
    engine: Engine,
    transports: Sequence[str],
    work: Work,
    *,
    rounds: int,
    tell: Callable[[str], None],
) -> dict[str, list[dict[str, Any]]]:
    """Measures `ellm serve`'s transports against the engine that serves, in this process.

    In every round each side continues `work.requests` prompts at once, then `work.alone` one by
    one; the clients are processes of their own, but on the same cores. Then each transport has
    `work.streams` clients at once while the event loop and the memory are watched.

    Args:
        engine: over any model; its steps are compiled by a first round that does not count.
        transports: of "http" and "grpc".
        work: what is asked.
        rounds: how many.
        tell: is told what is being done.

    Returns:
        A mapping of figures per round, by side; `DIRECT` is one of them. Tokens per second count
        output tokens.
    """
    sides: dict[str, _Side] = {DIRECT: _Direct(engine)}
    found: dict[str, list[dict[str, Any]]] = {DIRECT: []}
    crowds = _Crowds(engine.model_config.vocab_size, work)
    async with contextlib.AsyncExitStack() as stack:
        addresses = await stack.enter_async_context(_serving(engine, transports))
        for name in transports:
            sides[name] = stack.enter_context(_clients(name, addresses[name]))
            found[name] = []
        tell("compiling steps")
        for side in sides.values():
            await side.ask(*crowds.workload())
            await side.alone(crowds.make(2, work.alone_tokens))
        for count in range(rounds):
            for name, side in sides.items():
                tell(f"round {count + 1} of {rounds}: {name}")
                found[name].append(await _round(engine, side, crowds, work))
        for name in transports:
            tell(f"{work.streams} clients: {name}")
            found[name][0] |= await _crowd(engine, sides[name], crowds, work)
    return found


async def _round(engine: Engine, side: _Side, crowds: _Crowds, work: Work) -> dict[str, Any]:
    compiled_s = engine.stats().compile_s
    prompts, tokens = crowds.workload()
    seconds, failed = await side.ask(prompts, tokens)
    alone_s = await side.alone(crowds.make(work.alone, work.alone_tokens))
    ttft_ms = Spread.of([1e3 * each for each in alone_s])
    return {
        "output_tokens_per_s": sum(tokens) / seconds,
        "failed": failed,
        "ttft_ms": vars(ttft_ms),
        "compile_s": engine.stats().compile_s - compiled_s,
    }


async def _crowd(engine: Engine, side: _Side, crowds: _Crowds, work: Work) -> dict[str, Any]:
    watched = _Watched()
    watching = [
        asyncio.create_task(_watch_loop(watched)),
        asyncio.create_task(_watch_memory(engine, watched)),
    ]
    try:
        asked = crowds.make(work.streams, work.stream_tokens)
        seconds, failed = await side.ask(asked, [work.stream_tokens] * work.streams)
    finally:
        for task in watching:
            task.cancel()
    return {
        "streams": work.streams,
        "streams_tokens_per_s": work.streams * work.stream_tokens / seconds,
        "streams_failed": failed,
        "loop_late_p99_ms": 1e3 * float(np.percentile(watched.late_s, 99)),
        "loop_late_max_ms": 1e3 * max(watched.late_s),
        "physical_bytes": max(watched.physical_bytes),
        "limit_bytes": engine.memory().limit_bytes,
        "resident_peak_bytes": resident_bytes(os.getpid())[1],
    }


class _Side:
    """One way to ask."""

    async def ask(self, prompts: list[list[int]], tokens: list[int]) -> tuple[float, int]:
        """All at once; seconds, and how many failed."""
        raise NotImplementedError

    async def alone(self, prompts: list[list[int]]) -> list[float]:
        """One by one; seconds to each first token."""
        raise NotImplementedError


class _Direct(_Side):
    """The engine, called from a thread that does nothing else."""

    def __init__(self, engine: Engine):
        self._engine = engine

    async def ask(self, prompts: list[list[int]], tokens: list[int]) -> tuple[float, int]:
        begin_s = time.monotonic()
        await asyncio.to_thread(self._engine.generate, prompts, list(map(_params, tokens)))
        return time.monotonic() - begin_s, 0

    async def alone(self, prompts: list[list[int]]) -> list[float]:
        return await asyncio.to_thread(lambda: list(map(self._first, prompts)))

    def _first(self, prompt: list[int]) -> float:
        begin_s = time.monotonic()
        outputs = self._engine.stream(prompt, _params(_FEW_TOKENS))
        next(outputs)
        seconds = time.monotonic() - begin_s
        for _ in outputs:
            pass
        return seconds


class _Served(_Side):
    """Through a transport, by a process of clients."""

    def __init__(self, clients: ClientProcess):
        self._clients = clients

    async def ask(self, prompts: list[list[int]], tokens: list[int]) -> tuple[float, int]:
        asked = await self._clients.ask(prompts, tokens, at_once=True)
        return asked.seconds, asked.failed

    async def alone(self, prompts: list[list[int]]) -> list[float]:
        few = [_FEW_TOKENS] * len(prompts)
        return (await self._clients.ask(prompts, few, at_once=False)).ttft_s


def _params(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


@contextlib.asynccontextmanager
async def _serving(engine: Engine, transports: Sequence[str]) -> AsyncIterator[dict[str, str]]:
    """The server as `ellm serve` has it, on free ports of this machine; its addresses."""
    begun, stop = asyncio.Event(), asyncio.Event()
    addresses: dict[str, str] = {}

    def on_listening(listening: Listening) -> None:
        addresses.update(listening.addresses)
        begun.set()

    config = ServeConfig(
        MODEL_NAME,
        http=_ANY_PORT if "http" in transports else None,
        grpc=_ANY_PORT if "grpc" in transports else None,
    )
    serving = asyncio.create_task(serve(engine, config, on_listening=on_listening, stop=stop))
    serving.add_done_callback(lambda _: begun.set())
    await begun.wait()
    try:
        if addresses:
            yield addresses
    finally:
        stop.set()
        await serving


@contextlib.contextmanager
def _clients(transport: str, address: str) -> Iterator[_Side]:
    clients = ClientProcess(transport, address)
    try:
        yield _Served(clients)
    finally:
        clients.stop()


async def _watch_loop(watched: _Watched) -> None:
    """Notes by how much the loop is late for timers."""
    loop = asyncio.get_running_loop()
    while True:
        due_s = loop.time() + _LAG_SAMPLE_S
        await asyncio.sleep(_LAG_SAMPLE_S)
        watched.late_s.append(loop.time() - due_s)


async def _watch_memory(engine: Engine, watched: _Watched) -> None:
    while True:
        watched.physical_bytes.append(engine.memory().physical_bytes)
        await asyncio.sleep(_MEMORY_SAMPLE_S)


def medians(found: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The median of every figure over the rounds, by side; and beside a server's the part of
    `DIRECT`'s throughput that it has, and what it adds to the time to the first token."""
    result = {name: median_of(runs[:1]) | median_of(_same(runs)) for name, runs in found.items()}
    direct = result[DIRECT]
    for figures in result.values():
        figures["of_direct"] = figures["output_tokens_per_s"] / direct["output_tokens_per_s"]
        figures["added_ttft_ms"] = figures["ttft_ms"]["p50"] - direct["ttft_ms"]["p50"]
    return result


def _same(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what only the first round has."""
    return [{key: run[key] for key in runs[-1]} for run in runs]


def serving_table(found: dict[str, list[dict[str, Any]]]) -> str:
    """A table for people: a column for each side, medians of the rounds."""
    return columns(_ROWS, medians(found))


def _figure(key: str, form: str) -> Callable[[dict[str, Any]], str]:
    return lambda result: format(result[key], form) if key in result else "-"


def _bytes(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda result: format_bytes(int(result[key])) if key in result else "-"


def _rows() -> Iterator[Row]:
    yield "output tokens/s", _figure("output_tokens_per_s", ".0f")
    yield "of generate's", _figure("of_direct", ".1%")
    yield "TTFT p50 ms, one by one", lambda result: f"{result['ttft_ms']['p50']:.1f}"
    yield "added ms", _figure("added_ttft_ms", ".1f")
    yield "failed", _figure("failed", ".0f")
    yield "clients at once", _figure("streams", ".0f")
    yield "their output tokens/s", _figure("streams_tokens_per_s", ".0f")
    yield "failed of them", _figure("streams_failed", ".0f")
    yield "event loop late p99 ms", _figure("loop_late_p99_ms", ".1f")
    yield "event loop late max ms", _figure("loop_late_max_ms", ".1f")
    yield "engine's memory, most", _bytes("physical_bytes")
    yield "its limit", _bytes("limit_bytes")
    yield "process, resident at most", _bytes("resident_peak_bytes")


_ROWS = list(_rows())
