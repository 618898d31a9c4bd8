"""Latencies that a benchmark holds requests to: given, or many times the uncontended ones."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ellm_jax.bench.offline import make_prompts, submit
from ellm_jax.bench.trace_request import TraceRequest
from ellm_jax.engine import Engine
from ellm_jax.outputs import RequestMetrics

FACTOR = 25.0
"""How many times its uncontended latency a request may take (eLLM section 6, after AlpaServe)."""

_PROBES = 3
_PROBE_TOKENS = 16
_PROBE_SEED = 2**30


def length_class(prompt_tokens: int) -> int:
    """The class of a prompt by its length: the next power of two."""
    return 1 << (prompt_tokens - 1).bit_length()


@dataclass(frozen=True)
class Latencies:
    """Times of a request, in milliseconds.

    Attributes:
        ttft_ms: to the first token, by `length_class` of the prompt.
        tpot_ms: per token after it.
    """

    ttft_ms: Mapping[int, float]
    tpot_ms: float

    def targets(
        self, factor: float, ttft_ms: float | None = None, tpot_ms: float | None = None
    ) -> Latencies:
        """These times `factor`; what is given stands instead."""
        return Latencies(
            {c: ttft_ms or factor * value for c, value in self.ttft_ms.items()},
            tpot_ms or factor * self.tpot_ms,
        )

    def met_by(self, request: TraceRequest, arrival_s: float, metrics: RequestMetrics) -> bool:
        """Whether a request that is over was inside both; the TTFT counts from `arrival_s`."""
        if metrics.first_token_s is None or metrics.finished_s is None:
            return False
        ttft_ms = 1000 * (metrics.first_token_s - arrival_s)
        if ttft_ms > self.ttft_ms[length_class(request.prompt_tokens)]:
            return False
        return metrics.tpot_ms is None or metrics.tpot_ms <= self.tpot_ms

    def longest_ms(self, request: TraceRequest) -> float:
        """A request that takes longer, from its arrival to its end, was outside one of them."""
        ttft_ms = self.ttft_ms[length_class(request.prompt_tokens)]
        return ttft_ms + self.tpot_ms * (request.output_tokens - 1)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "ttft_ms": {str(key): value for key, value in sorted(self.ttft_ms.items())},
            "tpot_ms": self.tpot_ms,
        }


def strictest(measured: Iterable[Latencies]) -> Latencies:
    """The shortest of each time: targets for all policies that favour none."""
    every = list(measured)
    return Latencies(
        {key: min(m.ttft_ms[key] for m in every) for key in every[0].ttft_ms},
        min(m.tpot_ms for m in every),
    )


def uncontended(engine: Engine, requests: Sequence[TraceRequest], seed: int) -> Latencies:
    """Measures requests of each length class of a workload while nothing else runs.

    Each class is stood for by its request of median length, with prompts of random tokens of which
    none is in the prefix cache; medians of three. The engine should be warm.
    """
    classes: dict[int, list[TraceRequest]] = {}
    for request in requests:
        classes.setdefault(length_class(request.prompt_tokens), []).append(request)
    ttfts: dict[int, float] = {}
    tpots: list[float] = []
    for number, (key, members) in enumerate(sorted(classes.items())):
        members.sort(key=lambda request: request.prompt_tokens)
        middle = dataclasses.replace(
            members[len(members) // 2], prefix=None, prompt=None, token_ids=None
        )
        room = engine.max_model_len - middle.prompt_tokens
        tokens = max(1, min(room, max(2, min(middle.output_tokens, _PROBE_TOKENS))))
        prompts = make_prompts(engine, [middle] * _PROBES, _PROBE_SEED + seed + number)
        probes = [submit(engine, prompt, tokens).result().metrics for prompt in prompts]
        ttfts[key] = statistics.median(m.ttft_ms for m in probes if m.ttft_ms is not None)
        tpots += [m.tpot_ms for m in probes if m.tpot_ms is not None]
    # Without any, no request has a second token, and every target is met.
    return Latencies(ttfts, statistics.median(tpots) if tpots else 0.0)
