"""Measures one policy: the largest batch of long prompts, and long prompts with long answers."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from gpu_check_lib.report import Job
from gpu_check_lib.sizes import Sizes, Workload, sizes

CHUNK_TOKENS = 512
POLICIES = ("static", "elastic", "static-chunked")
_START_S = 5.0
"""Time left without which nothing more is begun."""


def result_path(out: Path, policy: str) -> Path:
    """Where a policy's figures lie."""
    return out / f"offline-{policy}.json"


def measure_policy(job: Job, policy: str) -> None:
    """Measures, and writes what it found after each part. Where the time is short, the last
    workloads are left out.

    Raises:
        RuntimeError: a part failed, or there was no time for it; the others were measured.
    """
    from ellm_jax.devices import open_devices
    from gpu_check_lib.inside import clear_memory, open_engine

    chosen = sizes(dry_run=job.dry_run)
    open_devices(chosen.device)
    path = result_path(job.out, policy)
    path.unlink(missing_ok=True)
    found: dict[str, Any] = {"workloads": {}, "timelines": {}, "capacity": None, "problems": []}
    settings = {"policy": policy, "max_num_seqs": chosen.max_num_seqs}
    if policy == "elastic":
        settings["host_memory"] = "1MiB" if job.dry_run else "16GiB"
    begin = time.monotonic()

    def write() -> None:
        found["seconds"] = time.monotonic() - begin
        path.write_text(json.dumps(found) + "\n")

    with open_engine(job, chosen, **settings) as engine:
        found["limit_bytes"] = engine.memory().limit_bytes
        found["floor_bytes"] = engine._loop.ledger.floor_bytes
        write()
        _compile_common(engine, chosen)
        clear_memory(engine)
        try:
            _capacity(engine, chosen, found)
        except Exception as error:
            found["problems"].append(f"largest batch: {error}")
        write()
        job.report.add("opened, and the largest batch", f"{found['seconds']:.0f} s")
        for workload in chosen.workloads:
            if job.left_s < _START_S + found.get("longest_s", 0.0):
                found["problems"].append(f"{workload.label}: no time was left")
                break
            try:
                _workload(engine, workload, chosen, found)
            except Exception as error:
                found["problems"].append(f"{workload.label}: {error}")
            write()
            job.report.add(workload.label, f"done after {found['seconds']:.0f} s")
    write()
    job.report.data["found"] = {name: found[name] for name in ("capacity", "workloads", "seconds")}
    if found["problems"]:
        raise RuntimeError("; ".join(found["problems"]))


def _compile_common(engine: Any, chosen: Sizes) -> None:
    """The step of as many decodes as may run, for fewer run on it too; and pieces of prompts."""
    from gpu_check_lib.inside import use_steps

    seqs, rules = chosen.max_num_seqs, engine._loop.scheduler.rules
    rows = [] if rules.whole_prompts else prefill_rows(rules.max_rows, 0, whole=False)
    use_steps(engine, [(seqs, seqs), *((max(seqs + 1, count), seqs) for count in rows)])


def prefill_rows(max_rows: int, prompt: int, *, whole: bool) -> list[int]:
    """Rows of the steps that compute prompts of one length, twice as many each time: from one
    prompt on where prompts are computed whole, else pieces from the size that has decodes beside
    it."""
    rows = [min(prompt if whole else CHUNK_TOKENS, max_rows)]
    while rows[-1] < max_rows:
        rows.append(min(2 * rows[-1], max_rows))
    return rows


def _workload(engine: Any, workload: Workload, chosen: Sizes, found: dict[str, Any]) -> None:
    """Every step that it needs is compiled, then it runs."""
    from ellm_jax.bench.offline import run_offline
    from ellm_jax.bench.trace_request import TraceRequest
    from gpu_check_lib.inside import use_steps

    rules = engine._loop.scheduler.rules
    seqs = chosen.max_num_seqs
    rows = prefill_rows(rules.max_rows, workload.prompt, whole=rules.whole_prompts)
    use_steps(engine, [(max(seqs + 1, count), seqs) for count in rows])
    started = time.monotonic()
    requests = [TraceRequest(0.0, workload.prompt, workload.output)] * workload.requests
    result, remarks = run_offline(engine, requests, seed=2, warm_up=False)
    found["workloads"][workload.label] = dataclasses.asdict(result) | {
        "compile_s": remarks.compile_s,
        "errors": list(remarks.errors),
    }
    found["timelines"][workload.label] = remarks.timeline
    found["longest_s"] = max(found.get("longest_s", 0.0), time.monotonic() - started)
    if remarks.compile_s:
        found["problems"].append(f"{workload.label}: compiled for {remarks.compile_s:.1f} s of it")


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
