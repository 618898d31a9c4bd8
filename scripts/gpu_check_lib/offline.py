"""Long prompts with long answers under each policy, and the largest batch behind longer ones."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_check_lib.report import Job, Report, main
from gpu_check_lib.sizes import Sizes, Workload, sizes

# In this order: what the bars compare comes first, should the time run out.
_POLICIES = ("static", "elastic", "static-chunked")
_SPEEDUP, _BATCH = 2.3, 3.0
_REHEARSED = 3
_START_S = 5.0
"""Time left without which nothing more is begun."""


def stage(job: Job) -> None:
    """A process per policy, each of which gets an equal part of the time that is left."""
    report = job.report
    results: dict[str, dict[str, Any]] = {}
    for number, policy in enumerate(_POLICIES):
        part_s = (job.left_s - _START_S) / (len(_POLICIES) - number)
        path = job.out / f"offline-{policy}.json"
        path.unlink(missing_ok=True)
        code = "import sys; from gpu_check_lib import offline; offline.run_policy(*sys.argv[1:])"
        settings = [policy, str(job.out), str(job.build), str(int(job.dry_run)), str(part_s)]
        ended = subprocess.run([sys.executable, "-P", "-c", code, *settings], check=False)
        if path.exists():
            results[policy] = json.loads(path.read_text())
        if ended.returncode:
            report.add(f"{policy}", f"failed with exit code {ended.returncode}; see the log")
    report.data["policies"] = results
    if not results:
        raise RuntimeError("no policy could be measured; see the log")
    chosen = sizes(dry_run=job.dry_run)
    for workload in chosen.workloads:
        _compare(report, workload, results)
    _compare_batches(report, chosen, results)
    _draw(report, job, results)
    if len(results) < len(_POLICIES):
        raise RuntimeError("not every policy could be measured; see the log")


def _compare(report: Report, workload: Workload, results: dict[str, dict[str, Any]]) -> None:
    speeds = {
        policy: found["workloads"][workload.label]["decoding_tokens_per_s"]
        for policy, found in results.items()
        if workload.label in found["workloads"]
    }
    label = f"{workload.label} (answers of {workload.output})"
    for policy in _POLICIES:
        if policy in speeds:
            report.add(f"{label}, {policy}", f"{speeds[policy]:.1f} decoding tokens/s")
        else:
            report.skip(f"{label}, {policy}", "no time was left")
    if "static" in speeds and "elastic" in speeds:
        ratio = speeds["elastic"] / max(speeds["static"], 1e-9)
        report.add(
            f"{label}, elastic over static", f"{ratio:.2f}", f"{_SPEEDUP}", ratio >= _SPEEDUP
        )


def _compare_batches(report: Report, chosen: Sizes, results: dict[str, dict[str, Any]]) -> None:
    batches = {p: found["capacity"]["batch"] for p, found in results.items() if found["capacity"]}
    label = f"largest batch of {chosen.long_context} tokens"
    for policy in _POLICIES:
        if policy in batches:
            report.add(f"{label}, {policy}", f"{batches[policy]}")
        else:
            reason = results.get(policy, {}).get("capacity_problem") or "no time was left"
            report.skip(f"{label}, {policy}", reason)
    if "static" in batches and "elastic" in batches:
        ratio = batches["elastic"] / max(batches["static"], 1)
        report.add(f"{label}, elastic over static", f"{ratio:.2f}", f"{_BATCH:g}", ratio >= _BATCH)


def run_policy(policy: str, out: str, build: str, dry_run: str, part_s: str) -> None:
    """Measures one policy and writes what it found after each part."""
    begin = time.monotonic()
    job = Job(
        Report(Path(out) / "unused.json"),
        Path(out),
        Path(),
        Path(build),
        dry_run == "1",
        begin + float(part_s),
    )
    chosen = sizes(dry_run=job.dry_run)
    found: dict[str, Any] = {"workloads": {}, "timelines": {}, "capacity": None, "problems": []}
    path = Path(out) / f"offline-{policy}.json"

    def write() -> None:
        found["seconds"] = time.monotonic() - begin
        path.write_text(json.dumps(found) + "\n")

    from gpu_check_lib.inside import open_engine

    settings = {"policy": policy, "max_num_seqs": chosen.max_num_seqs}
    if policy == "elastic":
        settings["host_memory"] = "1MiB" if job.dry_run else "16GiB"
    with open_engine(job, chosen, **settings) as engine:
        found["limit_bytes"] = engine.memory().limit_bytes
        found["floor_bytes"] = engine._loop.ledger.floor_bytes
        write()
        # Where the time is short, the longest prompts are left out.
        _capacity(engine, chosen, found)
        write()
        for workload in chosen.workloads:
            if job.left_s < _START_S + found.get("longest_s", 0.0):
                break
            started = time.monotonic()
            _workload(engine, workload, found)
            spent = time.monotonic() - started
            found["longest_s"] = max(found.get("longest_s", 0.0), spent)
            write()
    write()


def _workload(engine: Any, workload: Workload, found: dict[str, Any]) -> None:
    """A rehearsal that has every step compiled, then the workload."""
    from ellm_jax.bench.offline import run_offline
    from ellm_jax.bench.trace_request import TraceRequest
    from gpu_check_lib.inside import wait_for_compiler

    requests = [TraceRequest(0.0, workload.prompt, workload.output)] * workload.requests
    rehearsal = [TraceRequest(0.0, workload.prompt, 8)] * min(_REHEARSED, workload.requests)
    run_offline(engine, rehearsal, seed=1, warm_up=False)
    wait_for_compiler(engine)
    result, remarks = run_offline(engine, requests, seed=2, warm_up=False)
    found["workloads"][workload.label] = dataclasses.asdict(result) | {
        "compile_s": remarks.compile_s,
        "errors": list(remarks.errors),
    }
    found["timelines"][workload.label] = remarks.timeline


def _capacity(engine: Any, chosen: Sizes, found: dict[str, Any]) -> None:
    from ellm_jax.bench.capacity import measure_capacity
    from ellm_jax.bench.trace_request import WorkloadError

    try:
        capacity = measure_capacity(
            engine, chosen.long_context, output_tokens=256, watch_s=1.0, warm_up=False
        )
    except WorkloadError as error:
        found["capacity_problem"] = str(error)
        return
    found["capacity"] = dataclasses.asdict(capacity)


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
