"""Runs pytest and takes its counts into a stage's report."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence

from gpu_check_lib.report import NO_GPU, Job, NotRun


def run_pytest(job: Job, *args: str, before: Sequence[str] = ()) -> None:
    """Runs tests of the repository against the package that is imported.

    Args:
        job: the stage.
        args: of pytest.
        before: a command that runs Python under itself.

    Raises:
        NotRun: every test was skipped.
        RuntimeError: one failed.
    """
    result = job.report.path.with_suffix(".xml")
    result.unlink(missing_ok=True)
    # Not -m pytest: that would put the sources before the package.
    code = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    command = [*before, sys.executable, "-P", "-c", code, "-q", "-x" if before else "-rfE"]
    command += ["--rootdir", str(job.repo), "-c", str(job.repo / "pyproject.toml")]
    command += ["-o", f"cache_dir={job.build / 'pytest'}", f"--junitxml={result}", *args]
    ended = subprocess.run(command, cwd=job.repo, check=False)
    suites = list(ET.parse(result).getroot().iter("testsuite")) if result.exists() else []
    counts = {
        name: sum(int(suite.get(name, 0)) for suite in suites)
        for name in ("tests", "failures", "errors", "skipped")
    }
    job.report.data["tests"] = counts
    bad = counts["failures"] + counts["errors"]
    passed = counts["tests"] - bad - counts["skipped"]
    if not bad and ended.returncode in (0, 5) and not passed:
        raise NotRun(f"{NO_GPU}: {counts['skipped']} tests skipped")
    what = "tests passed" if not before else f"tests passed under {before[0].rpartition('/')[2]}"
    job.report.add(what, f"{passed}, {counts['skipped']} skipped", "none fails", not bad)
    if bad or ended.returncode:
        raise RuntimeError(f"{bad} tests failed, exit code {ended.returncode}; see the log")
