"""The policies side by side: what their own stages have found, and the bars."""

from __future__ import annotations

import json
from typing import Any

from gpu_check_lib.policies import POLICIES, result_path
from gpu_check_lib.report import Job, NotRun, Report, main
from gpu_check_lib.sizes import Sizes, Workload, sizes

_SPEEDUP, _BATCH = 2.3, 3.0


def stage(job: Job) -> None:
    """Reads what is there; what is missing has missed its bar."""
    report = job.report
    results: dict[str, dict[str, Any]] = {}
    for policy in POLICIES:
        path = result_path(job.out, policy)
        if path.exists():
            results[policy] = json.loads(path.read_text())
    if not results:
        raise NotRun("no policy was measured; run the stages offline_static, offline_elastic, ...")
    report.data["policies"] = results
    chosen = sizes(dry_run=job.dry_run)
    compare_batches(report, chosen, results)
    for workload in chosen.workloads:
        compare(report, workload, results)
    _draw(report, job, results)


def compare(report: Report, workload: Workload, results: dict[str, dict[str, Any]]) -> None:
    """Decoding speed under each policy."""
    label = f"{workload.label} (answers of {workload.output})"
    speeds = {}
    for policy in POLICIES:
        measured = results.get(policy, {}).get("workloads", {}).get(workload.label)
        if measured is None:
            report.skip(f"{label}, {policy}", "not measured; see the stage of the policy")
            continue
        note = f", of which {measured['compile_s']:.1f} s compiling" * (measured["compile_s"] > 0)
        report.add(
            f"{label}, {policy}", f"{measured['decoding_tokens_per_s']:.1f} decoding tokens/s{note}"
        )
        if not note and not measured["errors"]:
            speeds[policy] = measured["decoding_tokens_per_s"]
    _ratio(report, f"{label}, elastic over static", speeds, _SPEEDUP)


def compare_batches(report: Report, chosen: Sizes, results: dict[str, dict[str, Any]]) -> None:
    """The largest batch under each policy."""
    label = f"largest batch of {chosen.long_context} tokens"
    batches = {}
    for policy in POLICIES:
        found = results.get(policy, {})
        if found.get("capacity"):
            batches[policy] = found["capacity"]["batch"]
            report.add(f"{label}, {policy}", f"{batches[policy]}")
        else:
            report.skip(f"{label}, {policy}", found.get("capacity_problem") or "not measured")
    _ratio(report, f"{label}, elastic over static", batches, _BATCH)


def _ratio(report: Report, what: str, found: dict[str, Any], least: float) -> None:
    # The bars are those of 80 GB beside an 8B model: on a larger device the reservation is a
    # smaller part of the memory, and there is less to win.
    bar = f"{least:g} on 80 GB"
    if "static" not in found or "elastic" not in found:
        report.add(what, "not measured", bar, False)
        return
    ratio = found["elastic"] / max(found["static"], 1e-9)
    report.add(what, f"{ratio:.2f}", bar, ratio >= least)


def _draw(report: Report, job: Job, results: dict[str, dict[str, Any]]) -> None:
    """Policies as bars, and the memory of the elastic one over time."""
    from ellm_jax.bench.figures import figures_of
    from ellm_jax.bench.pictures import PictureUnavailable, draw_bars, draw_memory

    labels = dict.fromkeys(label for found in results.values() for label in found["workloads"])
    saved = [
        {
            "kind": "offline",
            "label": label,
            "policies": {
                policy: {"runs": [found["workloads"][label]]}
                for policy, found in results.items()
                if label in found["workloads"]
            },
        }
        for label in labels
    ]
    try:
        if saved:
            draw_bars(figures_of(saved), job.out / "offline.png", "Policies side by side")
        timelines = results.get("elastic", {}).get("timelines", {})
        for label, timeline in timelines.items():
            name = f"memory-{label.replace('/', '-')}.png"
            draw_memory(timeline, job.out / name, f"Memory by owner, elastic, {label}")
    except PictureUnavailable as error:
        report.skip("pictures", str(error))


if __name__ == "__main__":
    main(stage)
