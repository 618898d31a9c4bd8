"""Builds the package with its CUDA kernels, with nothing but what is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys

from gpu_check_lib.report import Job, NotRun, main


def stage(job: Job) -> None:
    """Installs into a folder of its own, where the other stages import it from."""
    site = job.build / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
    command += ["--no-index", "--upgrade", "--target", str(site), "--disable-pip-version-check"]
    command += ["-C", "cmake.define.ELLM_CUDA=ON", str(job.repo)]
    job.report.data["command"] = command
    if job.dry_run:
        raise NotRun("a dry run uses the ellm_jax that is installed")
    missing = [name for name in ("nvcc", "cmake") if shutil.which(name) is None]
    if missing:
        raise NotRun(f"{' and '.join(missing)} not found on PATH")
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    job.report.add("nvcc", version.stdout.strip().splitlines()[-1])
    job.build.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(site, ignore_errors=True)
    subprocess.run(command, check=True)
    code = "from ellm_jax import _native; print(len(_native.cuda_ffi_registrations()))"
    handlers = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False
    )
    count = handlers.stdout.strip() or "0"
    job.report.add("CUDA handlers in the build", count, "at least 1", count != "0")
    if count == "0":
        raise RuntimeError(f"the build has no CUDA handlers: {handlers.stderr.strip()[-500:]}")


if __name__ == "__main__":
    main(stage)
