"""Builds the package with its CUDA kernels, with nothing but what is installed."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from gpu_check_lib.report import Job, NotRun, main
from gpu_check_lib.tools import cuda_tool

_SOURCES = ("CMakeLists.txt", "pyproject.toml", "ellm_jax", "models", "xla_ffi")


def stage(job: Job) -> None:
    """Installs into a folder of its own, where the other stages import it from; not again where the
    sources are what they were."""
    site, mark = job.build / "site", job.build / "built_from"
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
    command += ["--no-index", "--upgrade", "--target", str(site), "--disable-pip-version-check"]
    command += ["-C", "cmake.define.ELLM_CUDA=ON", "-C", f"build-dir={job.build / 'cmake'}"]
    command += [str(job.repo)]
    job.report.data["command"] = command
    if job.dry_run:
        raise NotRun("a dry run uses the ellm_jax that is installed")
    nvcc = cuda_tool("nvcc")
    missing = ["nvcc"] * (nvcc is None) + ["cmake"] * (shutil.which("cmake") is None)
    if nvcc is None or missing:
        raise NotRun(f"{' and '.join(missing)} not found on PATH, in CUDACXX or /usr/local/cuda")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    job.report.add("nvcc", version.stdout.strip().splitlines()[-1])
    sources = fingerprint(job.repo)
    if mark.exists() and mark.read_text() == sources and _handlers()[0]:
        job.report.add("build", "there already, of these sources")
        return
    job.build.mkdir(parents=True, exist_ok=True)
    mark.unlink(missing_ok=True)
    shutil.rmtree(site, ignore_errors=True)
    subprocess.run(command, check=True, env={**os.environ, "CUDACXX": nvcc})
    count, said = _handlers()
    job.report.add("CUDA handlers in the build", f"{count}", "at least 1", count > 0)
    if not count:
        raise RuntimeError(f"the build has no CUDA handlers: {said[-500:]}")
    mark.write_text(sources)


def fingerprint(repo: Path) -> str:
    """Of everything that is built from."""
    digest = hashlib.sha256()
    for top in _SOURCES:
        path = repo / top
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(str(file.relative_to(repo)).encode())
                digest.update(file.read_bytes())
    return digest.hexdigest()


def _handlers() -> tuple[int, str]:
    """How many CUDA handlers the build has, and what was said where it cannot be imported."""
    code = "from ellm_jax import _native; print(len(_native.cuda_ffi_registrations()))"
    ran = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False
    )
    return int(ran.stdout.strip() or 0), ran.stderr.strip()


if __name__ == "__main__":
    main(stage)
