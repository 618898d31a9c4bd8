"""Runs a workload through an engine in this process, and says how that went."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from ellm_jax.bench.workload import Arrival, WorkloadError
from ellm_jax.config import format_bytes
from ellm_jax.engine import Engine
from ellm_jax.outputs import RequestOutput
from ellm_jax.sampling import SamplingParams

_WARM_UP_REQUESTS = 4
_WARM_UP_TOKENS = 8
_OWNERS = ("kv", "cache", "activation", "weights", "workspace")


@dataclass(frozen=True)
class Spread:
    """How a time is spread over requests, in milliseconds; None without any."""

    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The mean, and percentiles with linear interpolation."""
        if not values:
            return cls(None, None, None, None)
        p50, p90, p99 = (float(p) for p in np.percentile(values, (50, 90, 99)))
        return cls(float(np.mean(values)), p50, p90, p99)


@dataclass(frozen=True)
class HostOverhead:
    """Shares of the wall time, from 0 to 1, that the host loop spent on something.

    Attributes:
        planning: choosing requests and buckets, and packing inputs.
        mapping: taking memory: mapping and unmapping chunks.
        waiting: on steps: in the jitted call, where the CPU backend computes what is small, and
            for the results.
    """

    planning: float
    mapping: float
    waiting: float


@dataclass(frozen=True)
class OfflineResult:
    """How a workload went.

    Attributes:
        completed: requests that gave every token asked for.
        output_tokens: tokens generated.
        wall_s: from the start to the last token.
        output_tokens_per_s: the two divided.
        ttft_ms: from when a request was to arrive to its first token.
        tpot_ms: mean time per token after the first, of requests with more than one.
        peak_running: most requests that ran at once.
        preemptions: how often a request lost its memory to others and was resumed.
        memory_peak: most bytes by owner.
        host_overhead: where the host loop's time went.
    """

    completed: int
    output_tokens: int
    wall_s: float
    output_tokens_per_s: float
    ttft_ms: Spread
    tpot_ms: Spread
    peak_running: int
    preemptions: int
    memory_peak: dict[str, int]
    host_overhead: HostOverhead


@dataclass(frozen=True)
class Remarks:
    """What a reader of the result should know beside it.

    Attributes:
        compile_s: seconds of the window that went into compiling.
        errors: of requests that did not complete.
    """

    compile_s: float
    errors: tuple[str, ...]


def run_offline(
    engine: Engine, arrivals: Sequence[Arrival], *, seed: int = 0, progress: bool = False
) -> tuple[OfflineResult, Remarks]:
    """Runs a workload in real time, greedily, each answer exactly as long as asked.

    Compiling and first touches are done before the clock starts.

    Raises:
        WorkloadError: a request that the engine cannot take.
    """
    _check(engine, arrivals)
    vocab_size = engine.model_config.vocab_size
    prompts = [a.prompt(vocab_size, seed, i) for i, a in enumerate(arrivals)]
    _prepare(engine, arrivals, prompts)

    futures: list[Future[RequestOutput]] = []
    with tqdm(total=len(arrivals), desc="Workload", unit="req", disable=not progress) as bar:
        start_s = time.monotonic()
        for arrival, prompt in zip(arrivals, prompts, strict=True):
            pause_s = start_s + arrival.arrival_s - time.monotonic()
            if pause_s > 0:
                time.sleep(pause_s)
            future = _submit(engine, prompt, arrival.output_len)
            future.add_done_callback(lambda _: bar.update())
            futures.append(future)
        outputs = [future.result() for future in futures]
    return _measured(engine, arrivals, outputs, start_s)


def _check(engine: Engine, arrivals: Sequence[Arrival]) -> None:
    for index, arrival in enumerate(arrivals, 1):
        total = arrival.prompt_len + arrival.output_len
        if total > engine.max_model_len:
            raise WorkloadError(
                f"request {index} has {arrival.prompt_len} + {arrival.output_len} tokens, and "
                f"max_model_len is {engine.max_model_len}; shorten it, or raise max_model_len"
            )


def _prepare(engine: Engine, arrivals: Sequence[Arrival], prompts: Sequence[list[int]]) -> None:
    """Compiles every step, lets a few requests touch everything, and starts from clean memory."""
    engine.warm_up()
    first = zip(arrivals[:_WARM_UP_REQUESTS], prompts, strict=False)
    futures = [_submit(engine, p, min(a.output_len, _WARM_UP_TOKENS)) for a, p in first]
    for future in futures:
        future.result()
    engine.trim()
    engine.reset_stats()


def _submit(engine: Engine, prompt: list[int], output_len: int) -> Future[RequestOutput]:
    params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
    try:
        return engine.submit(prompt, params)
    except ValueError as error:
        raise WorkloadError(f"a request with {len(prompt)} prompt tokens: {error}") from error


def _measured(
    engine: Engine, arrivals: Sequence[Arrival], outputs: Sequence[RequestOutput], start_s: float
) -> tuple[OfflineResult, Remarks]:
    stats, memory = engine.stats(), engine.memory()
    ends_s = [o.metrics.finished_s for o in outputs if o.metrics.finished_s is not None]
    wall_s = max(ends_s, default=start_s) - start_s
    tokens = sum(len(output.token_ids) for output in outputs)
    # From the planned arrival: a submission that comes late is the engine's fault too.
    ttfts = [
        (output.metrics.first_token_s - start_s - arrival.arrival_s) * 1000
        for arrival, output in zip(arrivals, outputs, strict=True)
        if output.metrics.first_token_s is not None
    ]
    tpots = [o.metrics.tpot_ms for o in outputs if o.metrics.tpot_ms is not None]
    pairs = zip(arrivals, outputs, strict=True)
    whole_s = max(wall_s, 1e-9)
    result = OfflineResult(
        completed=sum(len(output.token_ids) == arrival.output_len for arrival, output in pairs),
        output_tokens=tokens,
        wall_s=wall_s,
        output_tokens_per_s=tokens / whole_s,
        ttft_ms=Spread.of(ttfts),
        tpot_ms=Spread.of(tpots),
        peak_running=stats.peak_running,
        preemptions=stats.preemptions,
        memory_peak={owner: memory.peaks[owner] for owner in _OWNERS},
        host_overhead=HostOverhead(
            planning=stats.plan_s / whole_s,
            mapping=stats.map_s / whole_s,
            waiting=(stats.dispatch_s + stats.wait_s) / whole_s,
        ),
    )
    errors = tuple(o.outputs[0].error for o in outputs if o.outputs[0].error is not None)
    return result, Remarks(stats.compile_s, errors)


def table(result: OfflineResult) -> str:
    """The result for people."""
    host = result.host_overhead
    lines = [
        f"completed      {result.completed}",
        f"output tokens  {result.output_tokens}",
        f"wall time      {result.wall_s:.2f} s",
        f"throughput     {result.output_tokens_per_s:.1f} tokens/s",
        "",
        "milliseconds          mean        p50        p90        p99",
        _times("to first token", result.ttft_ms),
        _times("per token after", result.tpot_ms),
        "",
        f"ran at once    {result.peak_running} at most",
        f"preemptions    {result.preemptions}",
        "memory at most "
        + ", ".join(f"{k} {format_bytes(v)}" for k, v in result.memory_peak.items() if v),
        f"host loop      planning {host.planning:.1%}, mapping {host.mapping:.1%}, "
        f"waiting for steps {host.waiting:.1%} of the wall time",
    ]
    return "\n".join(lines)


def _times(name: str, spread: Spread) -> str:
    values = (spread.mean, spread.p50, spread.p90, spread.p99)
    return f"{name:<15}" + "".join(f"{'-' if v is None else format(v, '.2f'):>11}" for v in values)
