"""Runs some of the tests of the kernels under compute-sanitizer."""

from __future__ import annotations

import dataclasses
import time

from gpu_check_lib.pytests import run_pytest
from gpu_check_lib.report import NO_GPU, Job, NotRun, main
from gpu_check_lib.tools import cuda_tool

_FOUND_SOMETHING = "99"
_THREE = (
    "in_one_step and 2-4-128-bfloat16",
    "alone_and_in_a_batch and bfloat16",
    "in_any_pieces and bfloat16",
)
TOOLS = {
    # Accesses out of bounds, and to memory that is not mapped.
    "memcheck": (
        *_THREE,
        "in_one_step and 1-20-64",
        "in_one_step and 1-7-256",
        "windows and bfloat16",
        "head_sizes",
        "only_chunk",
        "merged",
        "layers",
        "clears",
    ),
    # Barriers that are missing, between copies and their readers above all.
    "racecheck": _THREE,
    # Barriers that not all threads reach.
    "synccheck": _THREE,
}
"""The tests for each tool: every test takes many times as long under them, so not all of them."""


def selection(tool: str) -> str:
    """For pytest's -k."""
    return " or ".join(f"({part})" for part in TOOLS[tool])


def stage(job: Job) -> None:
    """Each tool in a run of its own; what one finds does not hide the others."""
    if job.dry_run:
        raise NotRun(NO_GPU)
    program = cuda_tool("compute-sanitizer")
    if program is None:
        raise NotRun("compute-sanitizer not found on PATH, or beside nvcc")
    failed = []
    for left, tool in zip(range(len(TOOLS), 0, -1), TOOLS, strict=True):
        share = dataclasses.replace(job, ends_s=time.monotonic() + job.left_s / left)
        # What XLA's own kernels and libraries do is not looked at: it would take hours. Calls that
        # fail are not either: JAX asks the driver for more than every driver has.
        under = [program, "--tool", tool, "--error-exitcode", _FOUND_SOMETHING]
        under += ["--kernel-name", "kernel_substring=ellm", "--target-processes", "all"]
        under += ["--report-api-errors", "no"] * (tool == "memcheck")
        tests = str(job.repo / "tests" / "gpu" / "test_kernels.py")
        try:
            run_pytest(
                share,
                "-m",
                "gpu",
                "-k",
                selection(tool),
                tests,
                before=under,
                label=f"{tool} tests",
            )
        except (RuntimeError, NotRun) as error:
            failed.append(f"{tool}: {error}")
    if failed:
        raise RuntimeError("; ".join(failed))


if __name__ == "__main__":
    main(stage)
