"""A comparison as a table for people, and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from ellm_jax.bench.peers.catalogue import OURS
from ellm_jax.bench.peers.comparison import EngineRuns, agreement, best_of, ratios
from ellm_jax.bench.peers.floors import reached
from ellm_jax.bench.tables import Row, columns

_NONE = "-"
_QUIET = 0.1
"""A share of busy cores that does not disturb."""


def report(
    found: Mapping[str, EngineRuns],
    titles: Mapping[str, str],
    floor: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The engines for JSON: figures of each run and their medians, and how ours compares.

    Args:
        found: by engine; ours among them.
        titles: names of the figures, by key.
        floor: what no engine can better, by key, where it is known.
    """
    engines = dict(found)
    floor = floor or {}
    best = best_of(engines, OURS)
    compared = {name: ratios(engines, OURS, name) for name in engines if name != OURS}
    return {
        "figures": dict(titles),
        "floor": {
            "figures": dict(floor),
            "reached": {name: reached(floor, engines[name].median) for name in engines},
        },
        "engines": {
            name: {
                "versions": engine.versions,
                "precision": engine.precision,
                "median": engine.median,
                "runs": [
                    {
                        "round": run.round,
                        "beside": run.beside,
                        "busy_before": run.busy_before,
                        "figures": run.figures,
                    }
                    for run in engine.runs
                ],
                "failures": engine.failures,
                "ours_is_better_by": compared.get(name, {}),
                "same_first_tokens": list(agreement(engines, OURS, name)) if name != OURS else [],
            }
            for name, engine in engines.items()
        },
        "best_peer": {
            key: {"name": name, "ours_is_better_by": compared[name].get(key)}
            for key, name in best.items()
        },
    }


def table(reported: Mapping[str, Any]) -> str:
    """The figures, a column for each engine that gave any, and for the floor where it is known; how
    near each comes to that; how many times better ours is; what failed; and whether the machine was
    at rest."""
    engines = reported["engines"]
    ran = {name: engine for name, engine in engines.items() if engine["median"]}
    titles = reported["figures"]
    parts = []
    if ran:
        rows: list[Row] = [("version", _version), ("precision", lambda e: e["precision"] or _NONE)]
        titles = {k: t for k, t in titles.items() if any(k in e["median"] for e in ran.values())}
        rows += [(title, _figure(key)) for key, title in titles.items()]
        floor = reported["floor"]["figures"]
        bound = {"floor": {"versions": {}, "precision": "", "median": floor}} if floor else {}
        parts.append(columns(rows, {**ran, **bound}))
        rows = [(title, _share(key)) for key, title in titles.items() if key in floor]
        if rows:
            shares = {name: reported["floor"]["reached"][name] for name in ran}
            parts.append(f"share of the floor that is reached\n{columns(rows, shares)}")
    others = {name: engine for name, engine in ran.items() if engine["ours_is_better_by"]}
    if others:
        rows = [(title, _ratio(key)) for key, title in titles.items()]
        rows.append(("first tokens as ours", _same))
        best = {
            "median": {},
            "ours_is_better_by": {
                key: entry["ours_is_better_by"] for key, entry in reported["best_peer"].items()
            },
            "same_first_tokens": [],
        }
        head = f"how many times better {OURS} is (best: at its precision)"
        parts.append(f"{head}\n{columns(rows, {**others, 'best': best})}")
    failed = [
        f"{name}: {stage} failed: {reason}"
        for name, engine in engines.items()
        for stage, reason in engine["failures"].items()
    ]
    if failed:
        parts.append("\n".join(failed))
    busy = [run["busy_before"] for engine in engines.values() for run in engine["runs"]]
    if busy and statistics.median(busy) > _QUIET:
        parts.append(
            f"other processes kept {statistics.median(busy):.0%} of these cores busy: the figures "
            "are low and uneven; measure again on a machine at rest"
        )
    return "\n\n".join(parts)


def _version(engine: Mapping[str, Any]) -> str:
    return next(iter(engine["versions"].values()), _NONE)


def _figure(key: str) -> Any:
    def write(engine: Mapping[str, Any]) -> str:
        value = engine["median"].get(key)
        if value is None:
            return _NONE
        return f"{value:.1f}" if value >= 10 else f"{value:.2f}"

    return write


def _ratio(key: str) -> Any:
    def write(engine: Mapping[str, Any]) -> str:
        value = engine["ours_is_better_by"].get(key)
        return _NONE if value is None else f"{value:.2f}x"

    return write


def _share(key: str) -> Any:
    def write(reached: Mapping[str, Any]) -> str:
        return f"{reached[key]:.0%}" if key in reached else _NONE

    return write


def _same(engine: Mapping[str, Any]) -> str:
    if not engine["same_first_tokens"]:
        return _NONE
    same, total = engine["same_first_tokens"]
    return f"{same} of {total}"
