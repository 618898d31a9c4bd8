"""Runs the tests that are marked gpu, those of the kernels first."""

from __future__ import annotations

from gpu_check_lib.pytests import run_pytest
from gpu_check_lib.report import Job, main

_FILES = ("test_kernels.py", "test_device_memory.py", "test_on_gpu.py")


def stage(job: Job) -> None:
    """All of them but parity, which has a stage of its own."""
    folder = job.repo / "tests" / "gpu"
    others = {path.name for path in folder.glob("test_*.py")} - {*_FILES, "test_parity.py"}
    run_pytest(job, "-m", "gpu", *(str(folder / name) for name in (*_FILES, *sorted(others))))


if __name__ == "__main__":
    main(stage)
