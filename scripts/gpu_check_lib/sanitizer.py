"""Runs the tests of the kernels under compute-sanitizer."""

from __future__ import annotations

import shutil

from gpu_check_lib.pytests import run_pytest
from gpu_check_lib.report import NO_GPU, Job, NotRun, main

_FOUND_SOMETHING = "99"


def stage(job: Job) -> None:
    """Looks for accesses out of bounds and to memory that is not mapped."""
    if job.dry_run:
        raise NotRun(NO_GPU)
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise NotRun("compute-sanitizer not found on PATH")
    # What XLA's own kernels and libraries do is not looked at: it would take hours.
    under = [tool, "--tool", "memcheck", "--error-exitcode", _FOUND_SOMETHING]
    under += ["--kernel-name", "kernel_substring=ellm", "--target-processes", "all"]
    run_pytest(job, "-m", "gpu and not slow", *_kernel_tests(job), before=under)


def _kernel_tests(job: Job) -> list[str]:
    return sorted(str(path) for path in (job.repo / "tests" / "gpu").glob("test_kernels*.py"))


if __name__ == "__main__":
    main(stage)
