"""Several policies side by side: the same workload through a fresh engine for each, in rounds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ellm_jax.bench.measure import median_of
from ellm_jax.bench.offline import OfflineResult, Remarks, run_offline
from ellm_jax.bench.tables import LATENCY_ROWS, Row, columns, peak_row
from ellm_jax.bench.trace_request import TraceRequest
from ellm_jax.engine import Engine

MakeEngine = Callable[[str], Engine]
"""From the name of a policy to an engine with it, to be closed by the caller."""


@dataclass
class PolicyRuns:
    """What a policy did in each round.

    Attributes:
        runs: the results as JSON has them, by round.
        errors: of requests that did not complete.
        compile_s: seconds that went into compiling while clocks ran.
        timeline: who owned the memory when, in the last round.
        cost: the engine's model of how long steps take, after the last round.
    """

    runs: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    compile_s: float = 0.0
    timeline: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> dict[str, Any]:
        """Each figure's median over the rounds."""
        return median_of(self.runs)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without the timeline."""
        return {"median": self.median, "runs": self.runs}

    def _add(self, result: OfflineResult, remarks: Remarks, engine: Engine) -> None:
        self.runs.append(dataclasses.asdict(result))
        self.errors += remarks.errors
        self.compile_s += remarks.compile_s
        self.timeline = remarks.timeline
        self.cost = engine.cost_model()


def compare_offline(
    make_engine: MakeEngine,
    policies: Sequence[str],
    requests: Sequence[TraceRequest],
    *,
    repeats: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, PolicyRuns]:
    """Runs the workload with every policy, then again, as often as asked: a machine that grows
    slower or faster meanwhile does so for all. One engine is open at a time.

    Raises:
        WorkloadError: a request that an engine cannot take.
    """
    results = {policy: PolicyRuns() for policy in policies}
    for number in range(1, repeats + 1):
        for policy in policies:
            label = policy if repeats == 1 else f"{policy} {number}/{repeats}"
            with make_engine(policy) as engine:
                result, remarks = run_offline(
                    engine, requests, seed=seed, progress=progress, label=label
                )
                results[policy]._add(result, remarks, engine)
    return results


def workload_summary(requests: Sequence[TraceRequest]) -> dict[str, Any]:
    """What was asked, for whoever reads a result later."""
    prompts = sorted(request.prompt_tokens for request in requests)
    outputs = sorted(request.output_tokens for request in requests)
    return {
        "requests": len(requests),
        "prompt_tokens": [prompts[0], prompts[len(prompts) // 2], prompts[-1]],
        "output_tokens": [outputs[0], outputs[len(outputs) // 2], outputs[-1]],
    }


_ROWS: list[Row] = [
    ("completed", lambda r: f"{r['completed']:g}"),
    ("wall time s", lambda r: f"{r['wall_s']:.2f}"),
    ("total tokens/s", lambda r: f"{r['total_tokens_per_s']:.1f}"),
    ("output tokens/s", lambda r: f"{r['output_tokens_per_s']:.1f}"),
    ("decoding tokens/s", lambda r: f"{r['decoding_tokens_per_s']:.1f}"),
    ("  in its steps", lambda r: f"{r['decode_step_tokens_per_s']:.1f}"),
    ("largest batch", lambda r: f"{r['peak_running']:g}"),
    *LATENCY_ROWS,
    ("planning", lambda r: f"{r['host_overhead']['planning']:.2%}"),
    ("mapping", lambda r: f"{r['host_overhead']['mapping']:.2%}"),
    ("waiting", lambda r: f"{r['host_overhead']['waiting']:.2%}"),
    peak_row("KV at most", "kv"),
    peak_row("cache at most", "cache"),
    peak_row("activation at most", "activation"),
    ("cached tokens", lambda r: f"{r['cached_tokens']:g}"),
    ("inflations", lambda r: f"{r['moves']['inflate']:g}"),
    ("deflations", lambda r: f"{r['moves']['deflate']:g}"),
    ("offloads", lambda r: f"{r['moves']['offload']:g}"),
    ("fetches", lambda r: f"{r['moves']['fetch']:g}"),
    ("evictions", lambda r: f"{r['moves']['evict']:g}"),
    ("preemptions", lambda r: f"{r['preemptions']:g}"),
]


def table(results: dict[str, dict[str, Any]]) -> str:
    """Results for people, a column each; `results` by policy."""
    return columns(_ROWS, results)
