"""An engine from inside: steady decoding, its step without the host, and work on its thread.

None of this is for users, so it reaches into the engine.
"""

from __future__ import annotations

import ctypes
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import jax

from ellm_jax import Engine, EngineConfig
from ellm_jax._native import Copier, HostBuffer
from ellm_jax.bench.capacity import synthetic_prompts
from ellm_jax.bench.offline import make_prompts, submit
from ellm_jax.bench.trace_request import TraceRequest
from ellm_jax.loop_stats import LoopStats
from ellm_jax.outputs import RequestOutput
from ellm_jax.runtime.batch import Span
from ellm_jax.runtime.shapes import StepShape
from gpu_check_lib.report import Job
from gpu_check_lib.sizes import Sizes, write_model

_T = TypeVar("_T")
_POLL_S = 0.01
_FEW_STEPS_S = 0.1
_ZEROS = 16
_PATIENCE_S = 240.0


def open_engine(job: Job, sizes: Sizes, **settings: Any) -> Engine:
    """An engine over random weights; compiled steps are kept with the build."""
    defaults: dict[str, Any] = {
        "device": sizes.device,
        "device_memory": sizes.device_memory,
        "load_format": "dummy",
        "prefix_caching": False,
        "warm_up": False,
        "progress": False,
        "idle_trim_s": None,
        "compilation_cache": str(job.build / "compiled"),
    }
    model = write_model(job.out / "model", sizes.model)
    return Engine.from_pretrained(model, EngineConfig(**{**defaults, **settings}))


def on_thread(engine: Engine, function: Callable[[], _T]) -> _T:
    """Has the engine's thread do something between two steps."""
    return engine._thread.call(function)


def wait_for_compiler(engine: Engine) -> None:
    """Waits until no step is being compiled in the background, well or not."""
    wait(list(engine._compiler._pending.values()))


def use_steps(engine: Engine, sizes: Sequence[tuple[int, int]]) -> None:
    """Compiles steps for so many rows and sequences, and has nothing else compiled as long as they
    cover what comes: nothing compiles beside what is measured."""
    compiler: Any = engine._compiler
    shapes = [compiler._buckets.fit(rows, seqs) for rows, seqs in sizes]
    on_thread(engine, lambda: compiler.compile_all(list(dict.fromkeys(shapes))))
    compiler.refine = lambda rows, seqs, mode: None


def shapes_of(engine: Engine) -> list[StepShape]:
    """Of the steps that are compiled."""
    return [key.shape for key in list(engine._compiler._needs)]


def clear_memory(engine: Engine) -> None:
    """Writes zeros to all chunks that slots can have, for prompts that are not computed: what was
    in memory before it was a chunk might be no number."""

    def clear() -> None:
        ledger: Any = engine._loop.ledger
        layout = ledger.kv.layout
        device = engine._loop.executor._runner._carry.epoch.devices().pop()  # type: ignore[attr-defined]
        name = "cpu" if device.platform == "cpu" else f"cuda:{device.local_hardware_id}"
        buffer = HostBuffer(ledger.chunk_bytes, _ZEROS * ledger.chunk_bytes, device=name)
        zeros = buffer.take(_ZEROS)
        for block in zeros:
            ctypes.memset(buffer.address(block), 0, ledger.chunk_bytes)
        copier = Copier(device=name)
        slots: list[int] = []
        most = ledger.chunks_for(layout.max_tokens)
        try:
            while len(slots) < layout.num_slots:
                slots.append(ledger.open_slot(layout.tile_tokens))
                for first in range(0, most, _ZEROS):
                    count = min(_ZEROS, most - first)
                    tokens = min((first + count) * layout.tile_tokens, layout.max_tokens)
                    ledger.extend(slots[-1], tokens)
                    copier.wait(copier.fetch(ledger.kv, slots[-1], first, buffer, zeros[:count]))
        except RuntimeError as error:
            # That was all but a few, or else what is measured will tell.
            print(f"memory is cleared as far as this: {error}", flush=True)
        finally:
            copier.close()
            for slot in slots:
                ledger.release(slot)

    on_thread(engine, clear)


@dataclass(frozen=True)
class Steady:
    """What steady decoding came to.

    Attributes:
        batch: requests that decoded.
        step_s: time of a step, from one to the next.
        device_s: time of such a step on the device alone, called again and again: the mean of the
            first and the last one watched, for requests grow meanwhile.
        context_tokens: that a request attends to, mean over requests and time.
        stats: of the loop over the time watched.
        watched_s: how long that was.
    """

    batch: int
    step_s: float
    device_s: float
    context_tokens: float
    stats: LoopStats
    watched_s: float

    @property
    def gap(self) -> float:
        """Share of a step in which the device waits for the host."""
        return max(0.0, 1 - self.device_s / self.step_s)


@contextmanager
def decoding(engine: Engine, batch: int, context: int, tokens: int) -> Iterator[int]:
    """So many requests decode behind contexts that are mapped and not computed; yields how many of
    them run at once. They end with the block."""
    requests = [TraceRequest(0.0, context, tokens)] * batch
    prompts = make_prompts(engine, requests, seed=0)
    with synthetic_prompts(engine):
        futures = [
            submit(engine, prompt, tokens, request_id=f"steady-{index}")
            for index, prompt in enumerate(prompts)
        ]
        try:
            yield _until_steady(engine, futures, batch)
        finally:
            for index in range(batch):
                engine.abort(f"steady-{index}")
            for future in futures:
                future.result()


def _until_steady(engine: Engine, futures: list[Future[RequestOutput]], batch: int) -> int:
    """Waits until as many decode as will, with nothing left to compile."""
    over = time.monotonic() + _PATIENCE_S
    last = engine.stats()
    running, since = 0, last.steps
    while time.monotonic() < over:
        time.sleep(_POLL_S)
        for future in futures:
            if future.done() and future.result().outputs[0].error:
                raise RuntimeError(f"a request failed: {future.result().outputs[0].error}")
        now = engine.stats()
        if now.peak_running > running:
            running, since = now.peak_running, now.steps
        if running and now.steps - since >= (4 if running == batch else 16):
            wait_for_compiler(engine)
            time.sleep(10 * _POLL_S)
            return running
    raise RuntimeError(f"after {_PATIENCE_S:.0f} s {running} of {batch} requests run")


def watch_steady(engine: Engine, batch: int, seconds: float, calls: int) -> Steady:
    """Measures requests that decode: as the loop runs them, and before and after that their step
    alone."""
    with _last_step(engine) as last:
        time.sleep(_FEW_STEPS_S)
        first_s, first_tokens = on_thread(engine, lambda: _step_alone(engine, last, calls))
        engine.reset_stats()
        begin = time.monotonic()
        time.sleep(seconds)
        stats, watched_s = dataclasses.replace(engine.stats()), time.monotonic() - begin
        if not stats.steps:
            raise RuntimeError(f"no step ran within {seconds:g} s: the requests were over")
        last_s, last_tokens = on_thread(engine, lambda: _step_alone(engine, last, calls))
    device_s, tokens = (first_s + last_s) / 2, (first_tokens + last_tokens) / 2
    return Steady(batch, watched_s / stats.steps, device_s, tokens, stats, watched_s)


@contextmanager
def _last_step(engine: Engine) -> Iterator[list[Any]]:
    """Remembers what was dispatched last, `dispatch`'s arguments; nothing before that."""
    runner: Any = engine._loop.executor._runner  # type: ignore[attr-defined]
    dispatch = runner.dispatch
    kept: list[Any] = []

    def remember(key: Any, spans: Sequence[Span], *rest: Any) -> Any:
        kept[:] = key, list(spans), *rest
        return dispatch(*kept)

    runner.dispatch = remember
    try:
        yield kept
    finally:
        del runner.dispatch


def _step_alone(engine: Engine, step: list[Any], calls: int) -> tuple[float, float]:
    """Seconds of a step on the device when the host only calls it, and the mean of the tokens that
    its requests attend to. What it computes is void: it writes the same token's K and V again."""
    if not step:
        raise RuntimeError("no step was dispatched: the requests were over")
    loop = engine._loop
    loop.drain()
    runner: Any = loop.executor._runner  # type: ignore[attr-defined]
    again = tuple(step)
    times = []
    for _ in range(3):
        jax.block_until_ready(runner.dispatch(*again))
        begin = time.perf_counter()
        result = None
        for _ in range(calls):
            result = runner.dispatch(*again)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - begin) / calls)
    spans: list[Span] = again[1]
    return min(times), sum(span.context_tokens + 1 for span in spans) / len(spans)
