"""Runs stages one after the other, each in processes of its own that end with it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
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
# Less than this is not worth beginning a stage with.
_LEAST_S = 30.0
# As `ellm_jax.devices.allocator` has it; written out because JAX must not be imported here.
ALLOCATOR = {
    "XLA_PYTHON_CLIENT_ALLOCATOR": "cuda_async",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}
"""Whoever uses JAX first in a stage, it has the allocator that engines need."""


def run_all(
    stages: Sequence[Stage],
    out: Path,
    *,
    dry_run: bool,
    within_s: float | None = None,
    pack: Path | None = None,
    package: str = "gpu_check_lib",
) -> int:
    """Runs stages, and prints a table of what they found.

    Args:
        stages: modules of `package`.
        out: folder for their files.
        dry_run: on the CPU, with tiny sizes.
        within_s: seconds for all of them together; those that come when little is left are not run.
        pack: folder for the summary and an archive of everything else; renewed after each stage.
        package: where the stages are.

    Returns:
        The program's exit code.
    """
    out.mkdir(parents=True, exist_ok=True)
    ends_s = float("inf") if within_s is None else time.monotonic() + within_s
    found: dict[str, dict[str, Any]] = {}
    for number, stage in enumerate(stages):
        print(f"--- {stage.name}: {stage.what}", flush=True)
        begin = time.monotonic()
        budget_s = _budget_s(stage, stages[number + 1 :], ends_s - begin)
        if budget_s < min(_LEAST_S, stage.budget_s):
            found[stage.name] = _not_run("no time was left")
        else:
            found[stage.name] = _run(stage, out, budget_s, dry_run=dry_run, package=package)
        found[stage.name]["seconds"] = round(time.monotonic() - begin, 1)
        _write_summary(found, out)
        if pack is not None:
            _pack(out, pack)
    print("\n" + table(found), flush=True)
    statuses = [result["status"] for result in found.values()]
    # Without a build nothing was looked at.
    nothing = not dry_run and statuses[:1] == ["not run"] and stages[0].name == "build"
    return int(nothing or any(status in ("failed", "out of time") for status in statuses))


def _budget_s(stage: Stage, later: Sequence[Stage], left_s: float) -> float:
    """A stage's part of the time that is left, such that something is left for those after it."""
    kept_s = sum(other.least_s for other in later)
    return min(stage.budget_s, left_s, max(stage.least_s, left_s - kept_s))


def _not_run(reason: str) -> dict[str, Any]:
    return {"status": "not run", "reason": reason, "rows": [], "data": {}}


def _write_summary(found: dict[str, dict[str, Any]], out: Path) -> None:
    (out / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "summary.txt").write_text(table(found))


def _pack(out: Path, pack: Path) -> None:
    """Three files, for machines that give few back."""
    pack.mkdir(parents=True, exist_ok=True)
    for name in ("summary.txt", "summary.json"):
        shutil.copyfile(out / name, pack / name)
    part = pack / "everything.part"
    with tarfile.open(part, "w:gz") as archive:
        for path in sorted(out.iterdir()):
            if path.is_file():
                archive.add(path, path.name)
    part.replace(pack / "everything.tar.gz")


def _run(
    stage: Stage, out: Path, budget_s: float, *, dry_run: bool, package: str
) -> dict[str, Any]:
    """Runs one stage and gives what it wrote."""
    result = out / f"{stage.name}.json"
    result.unlink(missing_ok=True)
    if stage.needs_build and not dry_run and not (SITE / "ellm_jax").is_dir():
        return _not_run("nothing is built; run the stage build first")
    command = [sys.executable, "-P", "-m", f"{package}.{stage.name}", stage.name, str(out)]
    command += [str(REPO), str(BUILD), str(max(1.0, budget_s - _GRACE_S))]
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
            process.wait(budget_s)
            timed_out = False
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            _end(process)
    return _result(result, log=out / f"{stage.name}.log", timed_out=timed_out)


def environment(*, dry_run: bool) -> dict[str, str]:
    """Of the stages: this folder and, but for a dry run, the build can be imported, and JAX has the
    allocator that engines need."""
    paths = [str(REPO / "scripts")] + [str(SITE)] * (not dry_run)
    given = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        **({} if dry_run else ALLOCATOR),
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
