"""Runs a workload through an engine in this process, and says how that went."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from ellm_jax.bench.measure import Decoding, Spread
from ellm_jax.bench.timeline import Timeline
from ellm_jax.bench.trace_request import TraceRequest, WorkloadError
from ellm_jax.engine import Engine
from ellm_jax.outputs import RequestOutput
from ellm_jax.sampling import SamplingParams

_WARM_UP_REQUESTS = 4
_WARM_UP_TOKENS = 8
_WARM_UP_SEED = 2**31
_OWNERS = ("kv", "cache", "activation", "weights", "workspace")
MOVES = ("inflate", "deflate", "offload", "fetch", "evict", "preempt")
"""Kinds of memory events that are counted."""


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
        prompt_tokens: tokens of the prompts, found in the prefix cache or computed.
        cached_tokens: those of them that were found.
        total_tokens_per_s: tokens of prompts and outputs by `wall_s`.
        decoding_tokens_per_s: see `Decoding.tokens_per_s`.
        decoding_s: seconds in which at least one request was between first and last token.
        decode_step_tokens_per_s: tokens after the first of each request by the time of the steps
            that decoded, whatever else these steps did; 0.0 without any. Unlike
            `decoding_tokens_per_s` it leaves out steps that only prefill while decodes wait.
        moves: memory events by kind.
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
    prompt_tokens: int
    cached_tokens: int
    total_tokens_per_s: float
    decoding_tokens_per_s: float
    decoding_s: float
    decode_step_tokens_per_s: float
    moves: dict[str, int]


@dataclass(frozen=True)
class Remarks:
    """What a reader of the result should know beside it.

    Attributes:
        compile_s: seconds of the window that went into compiling.
        errors: of requests that did not complete.
        timeline: who owned the memory when, as `Timeline.to_dict` has it, with its `events`.
    """

    compile_s: float
    errors: tuple[str, ...]
    timeline: dict[str, Any]


def run_offline(
    engine: Engine,
    requests: Sequence[TraceRequest],
    *,
    seed: int = 0,
    progress: bool = False,
    label: str = "Workload",
    warm_up: bool = True,
) -> tuple[OfflineResult, Remarks]:
    """Runs a workload in real time, greedily, each answer exactly as long as asked.

    Compiling and first touches are done before the clock starts. Without `warm_up` only those steps
    are compiled that a few requests need.

    Raises:
        WorkloadError: a request that the engine cannot take.
    """
    check_lengths(engine, requests)
    prompts = make_prompts(engine, requests, seed)
    prepare(engine, requests, seed, warm_up=warm_up)

    futures: list[Future[RequestOutput]] = []
    with (
        Timeline(engine) as timeline,
        tqdm(total=len(requests), desc=label, unit="req", disable=not progress) as bar,
    ):
        start_s = time.monotonic()
        for request, prompt in zip(requests, prompts, strict=True):
            pause_s = start_s + request.arrival_s - time.monotonic()
            if pause_s > 0:
                time.sleep(pause_s)
            future = submit(engine, prompt, request.output_tokens)
            future.add_done_callback(lambda _: bar.update())
            futures.append(future)
        outputs = [future.result() for future in futures]
    result = _measured(engine, requests, outputs, start_s)
    errors = tuple(o.outputs[0].error for o in outputs if o.outputs[0].error is not None)
    columns = timeline.to_dict(start_s) | {"events": _events_since(engine, start_s)}
    return result, Remarks(engine.stats().compile_s, errors, columns)


def check_lengths(engine: Engine, requests: Sequence[TraceRequest]) -> None:
    """Refuses a workload with a request that is longer than the engine takes.

    Raises:
        WorkloadError: such a request.
    """
    for index, request in enumerate(requests, 1):
        total = request.prompt_tokens + request.output_tokens
        if total > engine.max_model_len:
            raise WorkloadError(
                f"request {index} has {request.prompt_tokens} + {request.output_tokens} tokens, "
                f"and max_model_len is {engine.max_model_len}; shorten it, or raise max_model_len"
            )


def make_prompts(engine: Engine, requests: Sequence[TraceRequest], seed: int) -> list[list[int]]:
    """The prompts' tokens; texts by the model's tokenizer where it has one."""
    encode: Callable[[str], Sequence[int]] | None = None
    if engine.tokenizer is not None:
        encode = engine.tokenizer.encode
    vocab_size = engine.model_config.vocab_size
    return [r.prompt_ids(vocab_size, seed, index, encode) for index, r in enumerate(requests)]


def prepare(
    engine: Engine, requests: Sequence[TraceRequest], seed: int, *, warm_up: bool = True
) -> None:
    """Compiles every step unless told not to, lets a few requests touch everything, and starts from
    clean memory.

    The prompts are others than those of the workload, so that none is found in the prefix cache.
    """
    if warm_up:
        engine.warm_up()
    others = [
        dataclasses.replace(request, prefix=None, prompt=None, token_ids=None)
        for request in requests[:_WARM_UP_REQUESTS]
    ]
    prompts = make_prompts(engine, others, _WARM_UP_SEED + seed)
    futures = [
        submit(engine, prompt, min(request.output_tokens, _WARM_UP_TOKENS))
        for request, prompt in zip(others, prompts, strict=True)
    ]
    for future in futures:
        future.result()
    engine.trim()
    engine.reset_stats()


def submit(
    engine: Engine, prompt: list[int], output_tokens: int, **options: Any
) -> Future[RequestOutput]:
    """Queues a request for exactly so many tokens, greedily; `options` as `Engine.submit` takes.

    Raises:
        WorkloadError: the engine cannot take it.
    """
    params = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
    try:
        return engine.submit(prompt, params, **options)
    except ValueError as error:
        raise WorkloadError(f"a request with {len(prompt)} prompt tokens: {error}") from error


def _measured(
    engine: Engine,
    requests: Sequence[TraceRequest],
    outputs: Sequence[RequestOutput],
    start_s: float,
) -> OfflineResult:
    stats, memory = engine.stats(), engine.memory()
    ends_s = [o.metrics.finished_s for o in outputs if o.metrics.finished_s is not None]
    wall_s = max(ends_s, default=start_s) - start_s
    tokens = sum(len(output.token_ids) for output in outputs)
    # From the planned arrival: a submission that comes late is the engine's fault too.
    ttfts = [
        (output.metrics.first_token_s - start_s - request.arrival_s) * 1000
        for request, output in zip(requests, outputs, strict=True)
        if output.metrics.first_token_s is not None
    ]
    tpots = [o.metrics.tpot_ms for o in outputs if o.metrics.tpot_ms is not None]
    whole = [
        (request, output)
        for request, output in zip(requests, outputs, strict=True)
        if len(output.token_ids) == request.output_tokens
    ]
    prompt_tokens = sum(request.prompt_tokens for request, _ in whole)
    whole_s = max(wall_s, 1e-9)
    decoding = Decoding.of(outputs)
    return OfflineResult(
        completed=len(whole),
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
        prompt_tokens=prompt_tokens,
        cached_tokens=sum(output.metrics.cached_tokens for _, output in whole),
        total_tokens_per_s=(prompt_tokens + tokens) / whole_s,
        decoding_tokens_per_s=decoding.tokens_per_s,
        decoding_s=decoding.seconds,
        decode_step_tokens_per_s=stats.decode_tokens / stats.decode_s if stats.decode_s else 0.0,
        moves={kind: stats.moves.get(kind, 0) for kind in MOVES},
    )


def _events_since(engine: Engine, start_s: float) -> list[dict[str, Any]]:
    """The memory events after a time, for JSON, their times counted from it."""
    return [
        dataclasses.asdict(event) | {"time_s": round(event.time_s - start_s, 4)}
        for event in engine.events()
        if event.time_s >= start_s
    ]
