"""Runs stages one after the other, each in processes of its own that end with it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_check_lib.stages import Stage
from gpu_check_lib.table import table

REPO = Path(__file__).resolve().parents[2]
BUILD = REPO / "build" / "gpu_check"
SITE = BUILD / "site"
# Of a stage's time, so that it can end by itself.
_GRACE_S = 15.0


def run_all(
    stages: Sequence[Stage], out: Path, *, dry_run: bool, package: str = "gpu_check_lib"
) -> int:
    """Runs stages, modules of `package`, and prints a table of what they found; the program's exit
    code."""
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = {}
    for stage in stages:
        print(f"--- {stage.name}: {stage.what}", flush=True)
        begin = time.monotonic()
        found[stage.name] = _run(stage, out, dry_run=dry_run, package=package)
        found[stage.name]["seconds"] = round(time.monotonic() - begin, 1)
    (out / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    text = table(found)
    (out / "summary.txt").write_text(text)
    print("\n" + text, flush=True)
    return int(any(result["status"] in ("failed", "out of time") for result in found.values()))


def _run(stage: Stage, out: Path, *, dry_run: bool, package: str) -> dict[str, Any]:
    """Runs one stage and gives what it wrote."""
    result = out / f"{stage.name}.json"
    result.unlink(missing_ok=True)
    if stage.needs_build and not dry_run and not (SITE / "ellm_jax").is_dir():
        reason = "nothing is built; run the stage build first"
        return {"status": "not run", "reason": reason, "rows": [], "data": {}}
    command = [sys.executable, "-P", "-m", f"{package}.{stage.name}", stage.name, str(out)]
    command += [str(REPO), str(BUILD), str(max(1.0, stage.budget_s - _GRACE_S))]
    command += ["--dry-run"] * dry_run
    with (out / f"{stage.name}.log").open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=out,  # where ellm_jax cannot be taken from the sources
            env=environment(dry_run=dry_run),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(stage.budget_s)
            timed_out = False
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            _end(process)
    return _result(result, log=out / f"{stage.name}.log", timed_out=timed_out)


def environment(*, dry_run: bool) -> dict[str, str]:
    """Of the stages: this folder and, but for a dry run, the build can be imported."""
    paths = [str(REPO / "scripts")] + [str(SITE)] * (not dry_run)
    given = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths + [given] * bool(given)),
        "PYTHONUNBUFFERED": "1",
    }


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a stage with every process that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _result(path: Path, *, log: Path, timed_out: bool) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        found = {"status": "running", "reason": "", "rows": [], "data": {}}
    if timed_out:
        found["status"], found["reason"] = "out of time", "ended when its time was over"
    elif found["status"] == "running":
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        found["status"], found["reason"] = "failed", f"it died: {' '.join(last) or 'no output'}"
    path.write_text(json.dumps(found, indent=1) + "\n")
    return found
