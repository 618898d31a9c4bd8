"""What each policy would make of a trace on a machine that nobody has rented yet: simulated."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from ellm_jax._native import OutOfMemory
from ellm_jax.bench.measure import Spread
from ellm_jax.bench.online import ATTAINMENT, highest_rate
from ellm_jax.bench.slo_targets import FACTOR
from ellm_jax.bench.tables import LATENCY_ROWS, Row, columns, peak_row
from ellm_jax.bench.trace_request import TraceRequest
from ellm_jax.bench.traces import at_poisson_rate
from ellm_jax.config import format_bytes
from ellm_jax.request import Request
from ellm_jax.sampling import SamplingParams
from ellm_jax.scheduler.cost import StepWork
from ellm_jax.sim.world import Hooks, World, WorldConfig

OWNERS = ("weights", "kv", "cache", "activation", "workspace")
_VOCAB_SIZE = 256  # ids so small are kept once by Python, however long the prompts
_TOLERANCE = 0.1
_NONE = Spread.of([])


@dataclass(frozen=True)
class Targets:
    """Latency targets of requests.

    Attributes:
        ttft_ms, tpot_ms: of all; None: `factor` times what the request would take alone.
        factor: see there.
    """

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    factor: float = FACTOR

    def of(self, request: TraceRequest, config: WorldConfig) -> tuple[float, float]:
        """Milliseconds to the first token, and per token after it."""
        cost, host_s = config.cost, config.host_step_s
        context = request.prompt_tokens + request.output_tokens // 2
        alone_s = cost.prefill_s(0, request.prompt_tokens) + host_s
        token_s = cost.step_s(StepWork.decode(context)) + host_s
        return (
            self.ttft_ms or 1000 * self.factor * alone_s,
            self.tpot_ms or 1000 * self.factor * token_s,
        )


@dataclass(frozen=True)
class PolicyForecast:
    """What a policy would make of a trace.

    Attributes:
        problem: why it cannot run at all; "" if it can.
        requests: of the trace.
        refused: of them, those that can never run within the limit.
        rate_per_s: requests completed per second, from the first arrival to the last token.
        output_tokens_per_s: likewise.
        largest_batch: most requests that ran at once.
        ttft_ms, tpot_ms: of those completed.
        attainment: the share of all that was inside both targets, from 0 to 1.
        goodput_per_s: the highest rate of Poisson arrivals with `ATTAINMENT`; None: not looked for.
        preemptions, offloads: how often requests lost their memory, or went to host memory.
        cached_tokens: prompt tokens that were found instead of computed.
        memory_peak: most bytes by owner.
        host_peak_bytes: most bytes of host memory.
        busy: the share of the time in which the device computed.
    """

    problem: str = ""
    requests: int = 0
    refused: int = 0
    rate_per_s: float = 0.0
    output_tokens_per_s: float = 0.0
    largest_batch: int = 0
    ttft_ms: Spread = _NONE
    tpot_ms: Spread = _NONE
    attainment: float = 0.0
    goodput_per_s: float | None = None
    preemptions: int = 0
    offloads: int = 0
    cached_tokens: int = 0
    memory_peak: dict[str, int] = dataclasses.field(default_factory=dict)
    host_peak_bytes: int = 0
    busy: float = 0.0


def forecast(
    config: WorldConfig,
    trace: Sequence[TraceRequest],
    targets: Targets,
    *,
    goodput: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> PolicyForecast:
    """Simulates a trace, and with `goodput` looks for the highest rate that keeps the targets."""
    try:
        found = _Run(config, trace, targets, seed, progress).play()
    except OutOfMemory as error:
        return PolicyForecast(problem=str(error), requests=len(trace))
    if not goodput:
        return found

    def sustains(rate_per_s: float) -> bool:
        arrivals = at_poisson_rate(trace, rate_per_s, seed)
        run = _Run(config, arrivals, targets, seed, progress)
        return run.play().attainment >= ATTAINMENT

    first = max(found.rate_per_s, 1e-6) / 4
    return dataclasses.replace(found, goodput_per_s=highest_rate(sustains, first, _TOLERANCE))


class _Run:
    """One trace through one world."""

    def __init__(
        self,
        config: WorldConfig,
        trace: Sequence[TraceRequest],
        targets: Targets,
        seed: int,
        progress: bool,
    ):
        self._config = config
        self._trace = trace
        self._targets = targets
        self._seed = seed
        self._bar = tqdm(total=len(trace), desc=config.policy, unit="req", disable=not progress)
        self._ttfts: list[float] = []
        self._tpots: list[float] = []
        self._completed = self._inside = self._refused = 0
        self._tokens = self._cached_tokens = self._offloads = 0
        self.world = World(config, Hooks(on_finish=self._on_finish))

    def _on_finish(self, request: Request) -> None:
        self._bar.update()
        if request.finish_reason != "length" or request.first_token_s is None:
            return
        assert request.finished_s is not None
        self._completed += 1
        self._tokens += len(request.output_ids)
        self._cached_tokens += request.cached_tokens
        self._offloads += request.num_offloads
        ttft_ms = 1000 * (request.first_token_s - request.arrival_s)
        self._ttfts.append(ttft_ms)
        inside = request.ttft_ms is None or ttft_ms <= request.ttft_ms
        if len(request.output_ids) > 1:
            tpot_ms = 1000 * (request.finished_s - request.first_token_s)
            tpot_ms /= len(request.output_ids) - 1
            self._tpots.append(tpot_ms)
            inside = inside and (request.tpot_ms is None or tpot_ms <= request.tpot_ms)
        self._inside += inside

    def play(self) -> PolicyForecast:
        """To the end of the last request."""
        world, loop = self.world, self.world.loop
        coming = deque(enumerate(self._trace))
        with self._bar:
            while coming or loop.busy:
                while coming and coming[0][1].arrival_s <= world.clock():
                    self._submit(*coming.popleft())
                if loop.busy:
                    progressed = world.step()
                    assert progressed or coming, "nothing goes on, and nobody else comes"
                elif coming:
                    world.clock.wait_until(coming[0][1].arrival_s)
        whole_s = max(world.clock() - self._trace[0].arrival_s, 1e-9)
        buffer = world.buffer
        found = PolicyForecast(
            requests=len(self._trace),
            refused=self._refused,
            rate_per_s=self._completed / whole_s,
            output_tokens_per_s=self._tokens / whole_s,
            largest_batch=loop.stats.peak_running,
            ttft_ms=Spread.of(self._ttfts),
            tpot_ms=Spread.of(self._tpots),
            attainment=self._inside / len(self._trace),
            preemptions=loop.stats.preemptions,
            offloads=self._offloads,
            cached_tokens=self._cached_tokens,
            memory_peak={owner: world.peaks.get(owner, 0) for owner in OWNERS},
            host_peak_bytes=0 if buffer is None else buffer.usage()["peak_used"],
            busy=world.executor.busy_s / whole_s,
        )
        world.kv.close()
        return found

    def _submit(self, index: int, asked: TraceRequest) -> None:
        config = self._config
        total = asked.prompt_tokens + asked.output_tokens
        if total > config.layout.max_tokens:
            self._refuse()
            return
        ttft_ms, tpot_ms = self._targets.of(asked, config)
        ids: Sequence[int] = (0,) * asked.prompt_tokens
        if config.prefix_caching:
            ids = asked.prompt_ids(_VOCAB_SIZE, self._seed, index)
        request = Request(
            id=asked.id or str(index),
            prompt_ids=tuple(ids),
            params=SamplingParams(temperature=0.0, max_tokens=asked.output_tokens),
            seed=index,
            stop_ids=frozenset(),
            arrival_s=asked.arrival_s,
            ttft_ms=ttft_ms,
            tpot_ms=tpot_ms,
        )
        if self.world.could_ever_run(request):
            self.world.loop.submit(request)
        else:
            self._refuse()

    def _refuse(self) -> None:
        self._refused += 1
        self._bar.update()


def forecast_table(found: dict[str, PolicyForecast]) -> str:
    """Forecasts for people: a column per policy, and below why some cannot run."""
    able = {name: dataclasses.asdict(f) for name, f in found.items() if not f.problem}
    rows = _ROWS
    if all(result["goodput_per_s"] is None for result in able.values()):
        rows = [row for row in _ROWS if row[0] != "goodput req/s"]
    blocks = [columns(rows, able)] if able else []
    blocks += [f"{name} cannot run: {f.problem}" for name, f in found.items() if f.problem]
    return "\n\n".join(blocks)


_ROWS: list[Row] = [
    ("requests/s", lambda r: f"{r['rate_per_s']:.3g}"),
    ("output tokens/s", lambda r: f"{r['output_tokens_per_s']:.1f}"),
    ("goodput req/s", lambda r: f"{r['goodput_per_s'] or 0:.3g}"),
    ("inside targets", lambda r: f"{r['attainment']:.1%}"),
    ("can never run", lambda r: f"{r['refused']}/{r['requests']}"),
    ("largest batch", lambda r: f"{r['largest_batch']}"),
    ("device busy", lambda r: f"{r['busy']:.1%}"),
    *LATENCY_ROWS,
    ("cached tokens", lambda r: f"{r['cached_tokens']}"),
    ("preemptions", lambda r: f"{r['preemptions']}"),
    ("offloads", lambda r: f"{r['offloads']}"),
    *(peak_row(f"{owner} at most", owner) for owner in OWNERS),
    ("host at most", lambda r: format_bytes(r["host_peak_bytes"])),
]
