"""How many requests decode at once behind a context of a given length, and how fast."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass

from ellm_jax.bench.compare import MakeEngine
from ellm_jax.bench.offline import check_lengths, make_prompts, submit
from ellm_jax.bench.tables import Row, columns
from ellm_jax.bench.trace_request import TraceRequest, WorkloadError
from ellm_jax.config import format_bytes
from ellm_jax.engine import Engine
from ellm_jax.loop_stats import LoopStats
from ellm_jax.outputs import RequestOutput
from ellm_jax.request import Request

_POLL_S = 0.02
_WINDOW_STEPS = 8
_QUIET_STEPS = 16
_ROWS_PER_STEP = 128  # of a prompt; beside decodes, no policy computes fewer for long


@dataclass(frozen=True)
class Capacity:
    """What was found at one context length.

    Attributes:
        context: tokens of each prompt.
        batch: most requests that ran at once when no further one came in.
        mean_batch: tokens per step while this was watched; less than `batch` where requests lost
            their memory to one another.
        bounded: by "memory", or by "max_num_seqs", which stopped it first.
        decode_tokens_per_s: of all requests together, over the time watched.
        tpot_ms: time of a step while it was watched.
        watched_s: how long that was.
        preemptions: how often a request lost its memory meanwhile.
        kv_bytes: most bytes of KV cache meanwhile.
        limit_bytes: the limit of the device memory.
    """

    context: int
    batch: int
    mean_batch: float
    bounded: str
    decode_tokens_per_s: float
    tpot_ms: float
    watched_s: float
    preemptions: int
    kv_bytes: int
    limit_bytes: int


def measure_capacity(
    engine: Engine,
    context: int,
    *,
    output_tokens: int = 256,
    watch_s: float = 3.0,
    prefill: bool = False,
    seed: int = 0,
    warm_up: bool = True,
) -> Capacity:
    """Queues one request more than may run at once, waits until no further one comes in, and
    watches those that run.

    Args:
        engine: with nothing else to do.
        context: tokens of each prompt, all different.
        output_tokens: tokens of each answer: enough that none is over before it was watched.
        watch_s: for how long.
        prefill: compute the prompts. Else their chunks are mapped and hold whatever is in them:
            attention reads as much, and the answers mean nothing.
        seed: of the prompts.
        warm_up: compile every step first, rather than those that are needed when they are.

    Raises:
        WorkloadError: such a request can never run, or they are over too soon.
    """
    if output_tokens < 2:
        raise _over_too_soon(output_tokens)
    requests = [TraceRequest(0.0, context, output_tokens)] * (engine.config.max_num_seqs + 1)
    check_lengths(engine, requests)
    prompts = make_prompts(engine, requests, seed)
    if warm_up:
        engine.warm_up()
    engine.trim()
    engine.reset_stats()
    quiet_steps = _QUIET_STEPS + (context // _ROWS_PER_STEP if prefill else 0)
    marked = contextlib.nullcontext() if prefill else synthetic_prompts(engine)
    with marked:
        futures = [
            submit(engine, prompt, output_tokens, request_id=f"context-{index}")
            for index, prompt in enumerate(prompts)
        ]
        try:
            _until_quiet(engine, futures, quiet_steps)
            stats, watched_s = _watch(engine, futures, watch_s)
        finally:
            for index in range(len(futures)):
                engine.abort(f"context-{index}")
            outputs = [future.result() for future in futures]
    memory = engine.memory()
    errors = [o.outputs[0].error for o in outputs if o.outputs[0].error is not None]
    if errors:
        raise WorkloadError(f"a request with a context of {context} failed: {errors[0]}")
    if not stats.steps or not stats.decode_tokens:
        raise _over_too_soon(output_tokens)
    return Capacity(
        context=context,
        batch=stats.peak_running,
        mean_batch=stats.decode_tokens / stats.steps,
        bounded="max_num_seqs" if stats.peak_running >= engine.config.max_num_seqs else "memory",
        decode_tokens_per_s=stats.decode_tokens / watched_s,
        tpot_ms=1000 * watched_s / stats.steps,
        watched_s=watched_s,
        preemptions=stats.preemptions,
        kv_bytes=memory.peaks["kv"],
        limit_bytes=memory.limit_bytes,
    )


def _over_too_soon(output_tokens: int) -> WorkloadError:
    return WorkloadError(
        f"the requests were over before they could be watched; ask for more than "
        f"{output_tokens} tokens of output"
    )


@contextlib.contextmanager
def synthetic_prompts(engine: Engine) -> Iterator[None]:
    """Marks the prompts of what is submitted as computed. Not part of what users can ask for, so
    it reaches into the engine."""
    loop = engine._loop
    take: Callable[[Request], None] = loop.submit

    def submit_marked(request: Request) -> None:
        request.synthetic = True
        take(request)

    loop.submit = submit_marked  # type: ignore[method-assign]
    try:
        yield
    finally:
        loop.submit = take  # type: ignore[method-assign, assignment]


def _until_quiet(
    engine: Engine, futures: Sequence[Future[RequestOutput]], quiet_steps: int
) -> None:
    """Waits until for so many steps no further request has come in and no more of them have
    decoded at once, or until the first one is over."""
    running = decoding = since = 0
    seen = engine.stats()
    while not any(future.done() for future in futures):
        wait(futures, timeout=_POLL_S, return_when="FIRST_COMPLETED")
        now = engine.stats()
        steps = now.steps - seen.steps
        if steps < _WINDOW_STEPS:
            continue
        decoded = round((now.decode_tokens - seen.decode_tokens) / steps)
        if now.peak_running > running or decoded > decoding:
            running, decoding = now.peak_running, max(decoding, decoded)
            since = now.steps
        elif decoding and now.steps - since >= quiet_steps:
            return
        seen = now


def _watch(
    engine: Engine, futures: Sequence[Future[RequestOutput]], watch_s: float
) -> tuple[LoopStats, float]:
    """Statistics of the next seconds, or until the first request is over."""
    engine.reset_stats()
    begin_s = time.monotonic()
    wait(futures, timeout=watch_s, return_when="FIRST_COMPLETED")
    stats = engine.stats()
    return stats, time.monotonic() - begin_s


def compare_capacity(
    make_engine: MakeEngine,
    policies: Sequence[str],
    contexts: Sequence[int],
    *,
    output_tokens: int = 256,
    watch_s: float = 3.0,
    prefill: bool = False,
    seed: int = 0,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, list[Capacity]]:
    """Each policy, in a fresh engine, at each context; by policy, in the order of contexts.

    `tell` hears what is measured next.
    """
    results: dict[str, list[Capacity]] = {policy: [] for policy in policies}
    for context in contexts:
        for policy in policies:
            tell(f"{policy}, context of {context} tokens")
            with make_engine(policy) as engine:
                found = measure_capacity(
                    engine,
                    context,
                    output_tokens=output_tokens,
                    watch_s=watch_s,
                    prefill=prefill,
                    seed=seed,
                )
            results[policy].append(found)
    return results


_ROWS: list[Row] = [
    ("largest batch", lambda r: f"{r['batch']}"),
    ("bounded by", lambda r: str(r["bounded"])),
    ("mean batch", lambda r: f"{r['mean_batch']:.1f}"),
    ("decode tokens/s", lambda r: f"{r['decode_tokens_per_s']:.1f}"),
    ("step ms", lambda r: f"{r['tpot_ms']:.1f}"),
    ("KV at most", lambda r: format_bytes(r["kv_bytes"])),
    ("preemptions", lambda r: f"{r['preemptions']}"),
]


def capacity_table(results: dict[str, list[Capacity]]) -> str:
    """Results for people, by policy: a block for each context."""
    blocks = []
    for found in zip(*results.values(), strict=True):
        figures = {policy: dataclasses.asdict(f) for policy, f in zip(results, found, strict=True)}
        blocks.append(f"context of {found[0].context} tokens\n{columns(_ROWS, figures)}")
    return "\n\n".join(blocks)
