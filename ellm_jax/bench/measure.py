"""What is counted when requests have run, and how figures of several runs become one."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ellm_jax.outputs import RequestOutput


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
class Decoding:
    """How fast requests decoded while any did.

    Attributes:
        tokens: output tokens after the first one of each request.
        seconds: during which at least one request was between its first and its last token.
    """

    tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Decoding throughput, after eLLM section 6: the two divided.

        A request counts as decoding from its first token to its last, whether it gets tokens
        meanwhile or not. So a second in which it stands still (others are prefilled, its KV is on
        the host or is computed again) counts against the policy, and none gains by pausing it. What
        is left out is only the time before the first token of all, and gaps in which nobody
        decodes.
        """
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @classmethod
    def of(cls, outputs: Iterable[RequestOutput]) -> Decoding:
        """Counts the requests that are over and gave more than one token."""
        tokens, spans = 0, []
        for output in outputs:
            begin, end = output.metrics.first_token_s, output.metrics.finished_s
            count = len(output.token_ids)
            if begin is not None and end is not None and count > 1:
                tokens += count - 1
                spans.append((begin, end))
        return cls(tokens, covered_s(spans))


def covered_s(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds that lie in at least one of the spans from begin to end."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        if end > reached:
            total += end - max(begin, reached)
            reached = end
    return total


def median_of(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One mapping for several that are built alike: each number is the median of its numbers
    (those that are None left out), and of anything else the first is kept."""
    result: dict[str, Any] = {}
    for key, first in runs[0].items():
        values = [run[key] for run in runs]
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        if isinstance(first, Mapping):
            result[key] = median_of(values)
        elif numbers:
            result[key] = statistics.median(numbers)
        else:
            result[key] = first
    return result
