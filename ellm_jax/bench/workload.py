"""Our own workload files: random requests, and the JSONL that says them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ellm_jax.bench.trace_request import TraceRequest


def make_workload(
    requests: int,
    prompt_len: tuple[int, int],
    output_len: tuple[int, int],
    rate_per_s: float | None,
    seed: int,
) -> Iterator[TraceRequest]:
    """Random lengths between bounds, both included; arrivals of a Poisson process, or all at 0
    without a rate."""
    rng = np.random.default_rng(seed)
    now_s = 0.0
    for number in range(1, requests + 1):
        if rate_per_s is not None:
            now_s += float(rng.exponential(1 / rate_per_s))
        yield TraceRequest(
            arrival_s=round(now_s, 6),
            prompt_tokens=int(rng.integers(prompt_len[0], prompt_len[1] + 1)),
            output_tokens=int(rng.integers(output_len[0], output_len[1] + 1)),
            id=str(number),
        )


def workload_lines(requests: Iterable[TraceRequest]) -> Iterator[str]:
    """JSONL that `ellm_jax.bench.traces.read_trace` reads; texts are kept as lengths only."""
    for number, request in enumerate(requests, 1):
        fields: dict[str, Any] = {"arrival_s": request.arrival_s}
        if request.token_ids is None:
            fields["prompt_len"] = request.prompt_tokens
        else:
            fields["prompt_token_ids"] = request.token_ids
        fields["output_len"] = request.output_tokens
        if request.prefix is not None:
            fields["prefix"] = request.prefix
        if request.id not in ("", str(number)):
            fields["id"] = request.id
        yield json.dumps(fields)
