"""What of saved results is drawn as bars: figure -> workload -> policy, or engine -> value in each
run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ellm_jax.bench.peers.catalogue import comparable
from ellm_jax.bench.trace_request import WorkloadError

Figures = dict[str, dict[str, dict[str, list[float]]]]

_OFFLINE: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    "total throughput (tokens/s)": lambda run: run["total_tokens_per_s"],
    "decoding throughput (tokens/s)": lambda run: run["decoding_tokens_per_s"],
    "largest batch (requests)": lambda run: run["peak_running"],
    "mean TTFT (s)": lambda run: _seconds(run["ttft_ms"]["mean"]),
}
_AT_RATE: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    "mean TTFT (s)": lambda rate: _seconds(rate["ttft_ms"]["mean"]),
    "p99 TTFT (s)": lambda rate: _seconds(rate["ttft_ms"]["p99"]),
    "p99 TPOT (ms)": lambda rate: rate["tpot_ms"]["p99"],
}
_MEMORY: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    "largest batch (requests)": lambda found: found["batch"],
    "decode throughput (tokens/s)": lambda found: found["decode_tokens_per_s"],
}


def figures_of(results: Sequence[Mapping[str, Any]]) -> Figures:
    """The figures of results that `ellm bench offline`, `online`, `memory` or `peers` saved: of one
    kind, each a workload of its own.

    Raises:
        WorkloadError: they are of several kinds, or nothing that was saved here.
    """
    kinds = {result.get("kind") for result in results}
    if len(kinds) != 1 or not kinds <= _EXTRACT.keys():
        raise WorkloadError(
            "give results of one kind, as `ellm bench offline`, `online`, `memory` or `peers` "
            "writes them with --save"
        )
    figures: Figures = {}
    for result in results:
        kind = str(result["kind"])
        for side, found in result["engines" if kind == "peers" else "policies"].items():
            shown = _with_precision(result, side, found) if kind == "peers" else side
            for name, group, value in _EXTRACT[kind](result, found):
                if value is not None:
                    groups = figures.setdefault(name, {})
                    groups.setdefault(group, {}).setdefault(shown, []).append(float(value))
    return figures


Found = list[tuple[str, str, float | None]]


def _offline(result: Mapping[str, Any], found: Mapping[str, Any]) -> Found:
    label = str(result["label"])
    return [(name, label, get(run)) for name, get in _OFFLINE.items() for run in found["runs"]]


def _online(result: Mapping[str, Any], found: Mapping[str, Any]) -> Found:
    label = str(result["label"])
    entries: Found = []
    for run in found["runs"]:
        entries.append(("goodput (requests/s)", label, run["goodput_per_s"]))
        for rate in run["rates"]:
            group = f"{rate['rate_per_s']:g}/s"
            entries += [(name, group, get(rate)) for name, get in _AT_RATE.items()]
    return entries


def _memory(result: Mapping[str, Any], found: Mapping[str, Any]) -> Found:
    return [
        (name, f"context {run['context']}", get(run))
        for name, get in _MEMORY.items()
        for run in found["runs"]
    ]


def _peers(result: Mapping[str, Any], found: Mapping[str, Any]) -> Found:
    label = str(result["label"])
    return [
        (title, label, run["figures"].get(key))
        for key, title in result["figures"].items()
        for run in found["runs"]
    ]


def _with_precision(result: Mapping[str, Any], engine: str, found: Mapping[str, Any]) -> str:
    """The engine's name; with what it computes in, where that is not what was asked for."""
    precision = str(found["precision"])
    if not precision or comparable(precision, str(result["precision"])):
        return engine
    return f"{engine} ({precision})"


_EXTRACT = {"offline": _offline, "online": _online, "memory": _memory, "peers": _peers}


def _seconds(ms: float | None) -> float | None:
    return None if ms is None else ms / 1000
