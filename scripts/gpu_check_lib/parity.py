"""Runs the engine against stored answers of transformers, in float32 and bfloat16."""

from __future__ import annotations

from gpu_check_lib.pytests import run_pytest
from gpu_check_lib.report import Job, main


def stage(job: Job) -> None:
    """The tests of parity; in a dry run those of one model, on the CPU, which has to pass them."""
    on = ["--gpu-tests-on", "cpu", "-k", "float32 and mqa"] if job.dry_run else []
    run_pytest(job, *on, "-m", "gpu", "tests/gpu/test_parity.py")


if __name__ == "__main__":
    main(stage)
