"""Runs the tests that are marked gpu, except those of the kernels under their own stage."""

from __future__ import annotations

from gpu_check_lib.pytests import run_pytest
from gpu_check_lib.report import Job, main


def stage(job: Job) -> None:
    """All of them but parity, which has a stage of its own."""
    run_pytest(job, "-m", "gpu", "--deselect", "tests/gpu/test_parity.py", "tests/gpu")


if __name__ == "__main__":
    main(stage)
