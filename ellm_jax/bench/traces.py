"""Traces: whatever a file of requests is written in, read into one record; and made to fit.

The formats are found out from the content: our own JSONL (`ellm bench workload`), Azure LLM
inference CSV of 2023 and 2024, Mooncake JSONL, ShareGPT JSON, BurstGPT CSV.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ellm_jax.bench import trace_formats
from ellm_jax.bench.trace_formats import CountTokens
from ellm_jax.bench.trace_request import BLOCK_TOKENS, TraceRequest, WorkloadError

__all__ = [
    "BLOCK_TOKENS",
    "FORMATS",
    "TraceRequest",
    "WorkloadError",
    "at_poisson_rate",
    "at_rate",
    "clamped",
    "estimated_tokens",
    "load_trace",
    "read_trace",
    "repeated",
]

_READERS: dict[str, Callable[[Iterable[str], CountTokens], Iterator[TraceRequest]]] = {
    "jsonl": trace_formats.read_jsonl,
    "azure": trace_formats.read_azure,
    "mooncake": trace_formats.read_mooncake,
    "sharegpt": trace_formats.read_sharegpt,
    "burstgpt": trace_formats.read_burstgpt,
}
FORMATS = tuple(_READERS)
"""Names of the formats."""

_BYTES_PER_TOKEN = 4


def estimated_tokens(text: str) -> int:
    """Tokens of a text without a tokenizer: a token for four bytes of UTF-8, rounded up."""
    return -(-len(text.encode(errors="replace")) // _BYTES_PER_TOKEN)


def load_trace(
    path: str | Path,
    format: str | None = None,
    *,
    limit: int | None = None,
    count_tokens: CountTokens = estimated_tokens,
) -> list[TraceRequest]:
    """Reads a trace file; as `read_trace`.

    Raises:
        WorkloadError: a line that makes no sense, with its number; or a file without requests.
        OSError: the file cannot be read.
    """
    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            return read_trace(file, format, limit=limit, count_tokens=count_tokens)
    except UnicodeDecodeError as error:
        raise WorkloadError(f"{path} is not UTF-8 text ({error}); convert it first") from error
    except WorkloadError as error:
        raise WorkloadError(f"{path}: {error}") from error


def read_trace(
    lines: Iterable[str],
    format: str | None = None,
    *,
    limit: int | None = None,
    count_tokens: CountTokens = estimated_tokens,
) -> list[TraceRequest]:
    """Reads a trace into requests in order of arrival, the first at 0 unless the format is our own.

    Args:
        lines: of the file.
        format: one of `FORMATS`; None: found out from the content.
        limit: read so many requests from the start of the file; None: all.
        count_tokens: tokens of a text, for the format that has texts and no lengths.

    Raises:
        WorkloadError: a line that makes no sense, with its number; or no requests at all.
    """
    rest = iter(lines)
    head = list(itertools.islice(_until_content(rest), 64))
    if format is None:
        format = _detected(head)
    elif format not in _READERS:
        raise WorkloadError(f"no format {format!r}; there is {', '.join(FORMATS)}")
    found = _READERS[format](itertools.chain(head, rest), count_tokens)
    requests = sorted(itertools.islice(found, limit), key=lambda request: request.arrival_s)
    if not requests:
        raise WorkloadError(
            "there are no requests in it; make a workload with `ellm bench workload`"
        )
    if format == "jsonl":
        return requests
    start_s = requests[0].arrival_s
    return [dataclasses.replace(r, arrival_s=r.arrival_s - start_s) for r in requests]


def _until_content(lines: Iterator[str]) -> Iterator[str]:
    """Lines up to the first that is not empty, with it."""
    for line in lines:
        yield line
        if line.strip():
            return


def _detected(head: Sequence[str]) -> str:
    """The format of a file that starts so."""
    first = head[-1].strip() if head else ""
    if first.startswith("["):
        return "sharegpt"
    if first.startswith("{"):
        try:
            fields = json.loads(first).keys()
        except (ValueError, RecursionError):
            return "jsonl"  # its reader says what is wrong with the line
        if "conversations" in fields:
            return "sharegpt"
        return "mooncake" if {"input_length", "hash_ids"} & fields else "jsonl"
    columns = [name.strip() for name in first.split(",")]
    if set(trace_formats.AZURE_COLUMNS) <= set(columns):
        return "azure"
    if set(trace_formats.BURSTGPT_COLUMNS) <= set(columns):
        return "burstgpt"
    if not first:
        return "jsonl"
    raise WorkloadError(
        f"line {len(head)}: {first[:60]!r} begins no format that is known here "
        f"({', '.join(FORMATS)}); say which it is, or convert it to JSONL"
    )


def clamped(
    requests: Iterable[TraceRequest],
    max_prompt_tokens: int | None = None,
    max_output_tokens: int | None = None,
) -> list[TraceRequest]:
    """The requests with no prompt and no answer longer than these."""
    return [request.clamped(max_prompt_tokens, max_output_tokens) for request in requests]


def repeated(requests: Sequence[TraceRequest], count: int) -> list[TraceRequest]:
    """`count` requests: the first ones, the trace starting again where it is over. Between its
    end and its next start lies its mean pause. What is repeated shares no prefix with what it
    repeats, unless it has its tokens or its text given: these stay."""
    span_s = requests[-1].arrival_s - requests[0].arrival_s
    lap_s = span_s + span_s / max(1, len(requests) - 1)
    blocks = 1 + max((max(r.prefix) for r in requests if r.prefix), default=0)
    result = []
    for number in range(count):
        lap, place = divmod(number, len(requests))
        request = requests[place]
        prefix = request.prefix and tuple(block + lap * blocks for block in request.prefix)
        arrival_s = request.arrival_s + lap * lap_s
        result.append(dataclasses.replace(request, arrival_s=arrival_s, prefix=prefix))
    return result


def at_rate(requests: Sequence[TraceRequest], rate_per_s: float) -> list[TraceRequest]:
    """The requests from 0 on, their pauses stretched or shrunk so that so many come in a second
    on average: bursts stay bursts.

    Raises:
        WorkloadError: all arrive at once; there is no pause to scale.
    """
    start_s, end_s = requests[0].arrival_s, requests[-1].arrival_s
    if end_s <= start_s:
        raise WorkloadError(
            "the requests all arrive at once, so no rate can be given to them; use Poisson arrivals"
        )
    factor = (len(requests) - 1) / (end_s - start_s) / rate_per_s
    return [dataclasses.replace(r, arrival_s=(r.arrival_s - start_s) * factor) for r in requests]


def at_poisson_rate(
    requests: Sequence[TraceRequest], rate_per_s: float, seed: int
) -> list[TraceRequest]:
    """The requests in their order, arriving as a Poisson process. At another rate the same seed
    gives the same pauses, scaled."""
    pauses = np.random.default_rng(seed).exponential(1.0, len(requests))
    arrivals_s = (np.cumsum(pauses) - pauses[0]) / rate_per_s
    return [
        dataclasses.replace(request, arrival_s=float(arrival_s))
        for request, arrival_s in zip(requests, arrivals_s, strict=True)
    ]
