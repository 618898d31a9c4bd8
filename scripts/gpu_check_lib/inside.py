"""An engine from inside: steady decoding, its step without the host, and work on its thread.

None of this is for users, so it reaches into the engine.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import jax

from ellm_jax import Engine, EngineConfig
from ellm_jax.bench.capacity import synthetic_prompts
from ellm_jax.bench.offline import make_prompts, submit
from ellm_jax.bench.trace_request import TraceRequest
from ellm_jax.loop_stats import LoopStats
from ellm_jax.outputs import RequestOutput
from gpu_check_lib.report import Job
from gpu_check_lib.sizes import Sizes, write_model

_T = TypeVar("_T")
_POLL_S = 0.01
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
    """Waits until no step is being compiled in the background."""
    for job in list(engine._compiler._pending.values()):
        job.result()


@dataclass(frozen=True)
class Steady:
    """What steady decoding came to.

    Attributes:
        batch: requests that decoded.
        step_s: time of a step, from one to the next.
        device_s: time of the same step on the device alone, called again and again.
        stats: of the loop over the time watched.
        watched_s: how long that was.
    """

    batch: int
    step_s: float
    device_s: float
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
    """Measures requests that decode: as the loop runs them, then their step alone."""
    with _last_packed(engine) as packed:
        engine.reset_stats()
        begin = time.monotonic()
        time.sleep(seconds)
        stats, watched_s = dataclasses.replace(engine.stats()), time.monotonic() - begin
        if not stats.steps or not packed:
            raise RuntimeError(f"no step ran within {seconds:g} s: the requests were over")
        device_s = on_thread(engine, lambda: _step_alone(engine, packed, calls))
    return Steady(batch, watched_s / stats.steps, device_s, stats, watched_s)


@contextmanager
def _last_packed(engine: Engine) -> Iterator[dict[str, Any]]:
    """Remembers the step that was dispatched last: its key and metadata."""
    runner: Any = engine._loop.executor._runner  # type: ignore[attr-defined]
    dispatch = runner.dispatch
    kept: dict[str, Any] = {}

    def remember(key: Any, spans: Any, sampling: Any, targets: Any) -> Any:
        kept["step"] = (key, list(spans), sampling, targets)
        return dispatch(key, spans, sampling, targets)

    runner.dispatch = remember
    try:
        yield kept
    finally:
        del runner.dispatch


def _step_alone(engine: Engine, packed: dict[str, Any], calls: int) -> float:
    """Seconds of a step on the device when the host only calls it. What it computes is void: it
    writes the same token's K and V again."""
    loop = engine._loop
    loop.drain()
    runner: Any = loop.executor._runner  # type: ignore[attr-defined]
    times = []
    for _ in range(3):
        jax.block_until_ready(runner.dispatch(*packed["step"]))
        begin = time.perf_counter()
        result = None
        for _ in range(calls):
            result = runner.dispatch(*packed["step"])
        jax.block_until_ready(result)
        times.append((time.perf_counter() - begin) / calls)
    return min(times)
