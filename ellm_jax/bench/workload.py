"""A workload: when which request arrives, how long its prompt is and how long its answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_MAX_ARRIVAL_S = 1e6


class WorkloadError(ValueError):
    """A workload that makes no sense; says which line and why."""


@dataclass(frozen=True)
class Arrival:
    """One request of a workload.

    Attributes:
        arrival_s: seconds after the start.
        prompt_len: tokens of the prompt.
        output_len: tokens to generate, exactly.
        prompt_token_ids: the prompt; None for random tokens.
    """

    arrival_s: float
    prompt_len: int
    output_len: int
    prompt_token_ids: tuple[int, ...] | None = None

    def prompt(self, vocab_size: int, seed: int, index: int) -> list[int]:
        """The prompt's tokens; random ones are the same for the same seed and index."""
        if self.prompt_token_ids is not None:
            return list(self.prompt_token_ids)
        rng = np.random.default_rng([seed, index])
        tokens: list[int] = rng.integers(0, vocab_size, self.prompt_len).tolist()
        return tokens


def read_workload(lines: Iterable[str]) -> list[Arrival]:
    """Reads JSONL, in order of arrival.

    A line has `output_len`, one of `prompt_len` and `prompt_token_ids`, and `arrival_s` (0 where
    it is left out).

    Raises:
        WorkloadError: a line that does not, or no line at all.
    """
    arrivals = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            arrivals.append(_arrival(json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise WorkloadError(f"line {number}: {error}") from error
    if not arrivals:
        raise WorkloadError("the workload is empty; make one with `ellm bench workload`")
    return sorted(arrivals, key=lambda arrival: arrival.arrival_s)


def _arrival(fields: Any) -> Arrival:
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object")
    unknown = fields.keys() - {"arrival_s", "prompt_len", "prompt_token_ids", "output_len"}
    if unknown:
        raise ValueError(f"unknown field {min(unknown)!r}; leave it out")
    arrival_s = fields.get("arrival_s", 0.0)
    # So written, NaN is refused too; and a huge int is compared, never converted.
    if not _is_number(arrival_s) or not 0 <= arrival_s <= _MAX_ARRIVAL_S:
        raise ValueError(f"arrival_s={arrival_s!r}: must be seconds, from 0 to {_MAX_ARRIVAL_S:g}")
    ids, length = fields.get("prompt_token_ids"), fields.get("prompt_len")
    if (ids is None) == (length is None):
        raise ValueError("give one of prompt_len and prompt_token_ids")
    if ids is not None:
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise ValueError("prompt_token_ids must be a list of whole numbers")
        length = len(ids)
    return Arrival(
        arrival_s=float(arrival_s),
        prompt_len=_count("prompt_len", length),
        output_len=_count("output_len", fields.get("output_len")),
        prompt_token_ids=None if ids is None else tuple(ids),
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _count(name: str, value: object) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}={value!r}: must be a whole number of at least 1")
    return value


def make_workload(
    requests: int,
    prompt_len: tuple[int, int],
    output_len: tuple[int, int],
    rate_per_s: float | None,
    seed: int,
) -> Iterator[Arrival]:
    """Random lengths between bounds, both included; arrivals of a Poisson process, or all at 0
    without a rate."""
    rng = np.random.default_rng(seed)
    now_s = 0.0
    for _ in range(requests):
        if rate_per_s is not None:
            now_s += float(rng.exponential(1 / rate_per_s))
        yield Arrival(
            arrival_s=round(now_s, 6),
            prompt_len=int(rng.integers(prompt_len[0], prompt_len[1] + 1)),
            output_len=int(rng.integers(output_len[0], output_len[1] + 1)),
        )


def workload_lines(arrivals: Iterable[Arrival]) -> Iterator[str]:
    """JSONL that `read_workload` reads."""
    for arrival in arrivals:
        fields: dict[str, float | Sequence[int]] = {"arrival_s": arrival.arrival_s}
        if arrival.prompt_token_ids is None:
            fields["prompt_len"] = arrival.prompt_len
        else:
            fields["prompt_token_ids"] = list(arrival.prompt_token_ids)
        fields["output_len"] = arrival.output_len
        yield json.dumps(fields)
