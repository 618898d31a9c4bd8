"""Runs pytest and takes its counts into a stage's report."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence

import pytest

from gpu_check_lib.report import NO_GPU, Job, NotRun

# A test under way when the time is over has to end too.
_LAST_TEST_S = 25.0
_ENDS = "GPU_CHECK_ENDS"
# Steps of tiny models are to compile quickly, not to run fast.
_QUICK_COMPILES = "--xla_gpu_autotune_level=0"


def run_pytest(job: Job, *args: str, before: Sequence[str] = (), label: str = "tests") -> None:
    """Runs tests of the repository against the package that is imported, as many as there is time
    for.

    Args:
        job: the stage.
        args: of pytest.
        before: a command that runs Python under itself.
        label: for the row of the table, and the file of results.

    Raises:
        NotRun: every test was skipped.
        RuntimeError: one failed, or there was no time for all.
    """
    result = job.report.path.with_suffix(f".{label.replace(' ', '-')}.xml")
    result.unlink(missing_ok=True)
    # Not -m pytest: that would put the sources before the package.
    code = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    command = [*before, sys.executable, "-P", "-c", code, "-q", "-x" if before else "-rfE"]
    command += ["--rootdir", str(job.repo), "-c", str(job.repo / "pyproject.toml")]
    command += ["-o", f"cache_dir={job.build / 'pytest'}", f"--junitxml={result}"]
    command += ["-p", "gpu_check_lib.pytests", "--durations=10", *args]
    env = {**os.environ, _ENDS: str(job.ends_s - _LAST_TEST_S)}
    if not job.dry_run:
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {_QUICK_COMPILES}".strip()
    ended = subprocess.run(command, cwd=job.repo, env=env, check=False)
    suites = list(ET.parse(result).getroot().iter("testsuite")) if result.exists() else []
    counts = {
        name: sum(int(suite.get(name, 0)) for suite in suites)
        for name in ("tests", "failures", "errors", "skipped")
    }
    job.report.data[label] = counts
    bad = counts["failures"] + counts["errors"]
    passed = counts["tests"] - bad - counts["skipped"]
    if not bad and ended.returncode in (0, 5) and not passed:
        raise NotRun(f"{NO_GPU}: {counts['skipped']} tests skipped")
    cut = ended.returncode == pytest.ExitCode.INTERRUPTED
    found = f"{passed}, {counts['skipped']} skipped" + ", no time for the rest" * cut
    job.report.add(f"{label} passed", found, "none fails", not bad and not ended.returncode)
    if cut and not bad:
        raise RuntimeError(f"there was time for {passed} tests only")
    if bad or ended.returncode:
        raise RuntimeError(f"{bad} tests failed, exit code {ended.returncode}; see the log")


def pytest_runtest_logfinish(nodeid: str, location: object) -> None:
    """Has pytest stop between two tests when the stage's time is nearly over, so that what it found
    until then is written."""
    if _session and time.monotonic() > float(os.environ[_ENDS]):
        _session[0].shouldstop = "the stage's time is over"


_session: list[pytest.Session] = []


def pytest_sessionstart(session: pytest.Session) -> None:
    """Remembers what is to be stopped."""
    _session.append(session)
