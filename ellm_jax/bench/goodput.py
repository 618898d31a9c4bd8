"""Several policies online, side by side: the same targets, the same arrivals, fresh engines."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ellm_jax.bench.compare import MakeEngine
from ellm_jax.bench.measure import median_of
from ellm_jax.bench.offline import check_lengths, prepare
from ellm_jax.bench.online import ATTAINMENT, Load, RateResult, highest_rate, run_rate
from ellm_jax.bench.slo_targets import FACTOR, Latencies, length_class, strictest, uncontended
from ellm_jax.bench.tables import LATENCY_ROWS, Row, columns
from ellm_jax.engine import Engine


@dataclass(frozen=True)
class Question:
    """What is to be found out.

    Attributes:
        load: what arrives.
        rates: requests per second to measure at, each to its end.
        stop_at_miss: go through the rates from the lowest, and leave out those above one at which
            a policy misses the attainment asked for; it is of no use to see it fail worse.
        sweep: look for the goodput, the highest rate with the attainment asked for.
        factor: targets are so many times the uncontended latencies.
        ttft_ms, tpot_ms: targets that stand instead.
        attainment: the share of requests that has to be inside both.
        tolerance: how exact the goodput is to be; 0.1: to a tenth.
        repeats: rounds, each with other arrivals.
        seed: of arrivals and prompts.
    """

    load: Load
    rates: Sequence[float] = ()
    stop_at_miss: bool = False
    sweep: bool = True
    factor: float = FACTOR
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    attainment: float = ATTAINMENT
    tolerance: float = 0.1
    repeats: int = 1
    seed: int = 0


@dataclass
class OnlineRun:
    """One policy in one round.

    Attributes:
        rates: what was measured at the rates asked for.
        tried: what the search for the goodput met, in its order.
        goodput_per_s: the highest rate met with the attainment asked for; 0.0: none.
    """

    rates: list[RateResult] = field(default_factory=list)
    tried: list[RateResult] = field(default_factory=list)
    goodput_per_s: float = 0.0


@dataclass(frozen=True)
class OnlineReport:
    """What was found out.

    Attributes:
        uncontended: the latencies of requests alone, by policy.
        targets: the same for all policies: from the shortest uncontended ones.
        runs: by policy, then round.
    """

    uncontended: dict[str, Latencies]
    targets: Latencies
    runs: dict[str, list[OnlineRun]]

    def medians(self) -> dict[str, dict[str, Any]]:
        """Each figure's median over the rounds, by policy; of a rate that a policy did not come to
        in every round, over those in which it did (`rounds`)."""
        return {policy: _median(runs) for policy, runs in self.runs.items()}

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        medians = self.medians()
        return {
            "uncontended": {name: found.to_dict() for name, found in self.uncontended.items()},
            "slo": self.targets.to_dict(),
            "policies": {
                policy: {
                    "median": medians[policy],
                    "runs": [dataclasses.asdict(run) for run in runs],
                }
                for policy, runs in self.runs.items()
            },
        }


def measure_online(
    make_engine: MakeEngine,
    policies: Sequence[str],
    question: Question,
    *,
    progress: bool = False,
) -> OnlineReport:
    """Measures the uncontended latencies, fixes the targets, then lets requests arrive.

    Compiling and first touches are done before any clock starts. One engine is open at a time.

    Raises:
        WorkloadError: a request that an engine cannot take, or a trace without times.
    """
    alone: dict[str, Latencies] = {}
    for policy in policies:
        with make_engine(policy) as engine:
            _make_ready(engine, question)
            alone[policy] = uncontended(engine, question.load.requests, question.seed)
    shortest = strictest(alone.values())
    targets = shortest.targets(question.factor, question.ttft_ms, question.tpot_ms)
    first = _serial_rate(question.load, shortest)
    runs: dict[str, list[OnlineRun]] = {policy: [] for policy in policies}
    for number in range(question.repeats):
        for policy in policies:
            with make_engine(policy) as engine:
                _make_ready(engine, question)
                seed = question.seed + number
                runs[policy].append(_run(engine, question, targets, first, seed, progress))
    return OnlineReport(alone, targets, runs)


def _make_ready(engine: Engine, question: Question) -> None:
    check_lengths(engine, question.load.requests)
    prepare(engine, question.load.requests, question.seed)


def _serial_rate(load: Load, alone: Latencies) -> float:
    """The rate at which requests would follow one another: a start for the search."""
    mean_ms = statistics.fmean(
        alone.ttft_ms[length_class(r.prompt_tokens)] + alone.tpot_ms * (r.output_tokens - 1)
        for r in load.requests
    )
    return 1000 / max(mean_ms, 1e-3)


def _run(
    engine: Engine,
    question: Question,
    targets: Latencies,
    first: float,
    seed: int,
    progress: bool,
) -> OnlineRun:
    run = OnlineRun()

    def measured(rate: float, needed: float | None) -> RateResult:
        return run_rate(
            engine,
            question.load.at(rate, seed),
            rate,
            targets,
            salt=f"rate-{len(run.rates) + len(run.tried)}",
            seed=seed,
            needed=needed,
            progress=progress,
        )

    def sustains(rate: float) -> bool:
        run.tried.append(measured(rate, question.attainment))
        return run.tried[-1].attainment >= question.attainment

    for rate in sorted(question.rates) if question.stop_at_miss else question.rates:
        run.rates.append(measured(rate, None))
        if run.rates[-1].attainment >= question.attainment:
            run.goodput_per_s = max(run.goodput_per_s, rate)
        elif question.stop_at_miss:
            break
    if question.sweep:
        run.goodput_per_s = highest_rate(sustains, first, question.tolerance)
    return run


def _median(runs: Sequence[OnlineRun]) -> dict[str, Any]:
    at_rate: dict[float, list[dict[str, Any]]] = {}
    for run in runs:
        for result in run.rates:
            at_rate.setdefault(result.rate_per_s, []).append(dataclasses.asdict(result))
    return {
        "goodput_per_s": statistics.median(run.goodput_per_s for run in runs),
        "rates": {
            f"{rate:g}": {**median_of(found), "rounds": len(found)}
            for rate, found in at_rate.items()
        },
    }


def online_table(report: OnlineReport) -> str:
    """The report for people: a column per policy, a block per rate."""
    medians = report.medians()
    classes = ", ".join(
        f"{ms:.0f} (prompts to {c})" for c, ms in sorted(report.targets.ttft_ms.items())
    )
    goodput: Row = ("goodput req/s", lambda r: f"{r['goodput_per_s']:.3g}")
    blocks = [
        f"targets in ms: TTFT {classes}; TPOT {report.targets.tpot_ms:.1f}",
        columns([goodput], medians),
    ]
    # The rates in the order of whoever came to most of them.
    for rate in max((median["rates"] for median in medians.values()), key=len):
        at_rate = {
            p: median["rates"][rate] for p, median in medians.items() if rate in median["rates"]
        }
        blocks.append(f"at {rate} requests/s\n{columns(_ROWS, at_rate)}")
    return "\n\n".join(blocks)


_ROWS: list[Row] = [
    ("rounds", lambda r: str(r["rounds"])),
    ("attainment", lambda r: f"{r['attainment']:.1%}"),
    ("completed", lambda r: f"{r['completed']:g}/{r['requests']:g}"),
    *LATENCY_ROWS,
    ("preemptions", lambda r: f"{r['preemptions']:g}"),
]
