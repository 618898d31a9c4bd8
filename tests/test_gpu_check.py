"""scripts/gpu_check, as far as it goes without a GPU."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "scripts"))

from gpu_check_lib import run, stages, table  # noqa: E402  # found by the line above
from gpu_check_lib.stages import Stage  # noqa: E402

NEED_A_GPU = {"build", "tests", "sanitizer", "kernels"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_dry_run_goes_through_every_stage(tmp_path):
    out = tmp_path / "out"
    ran = subprocess.run(
        [sys.executable, str(REPO / "scripts" / "gpu_check"), str(out), "--dry-run"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    logs = {path.name: path.read_text()[-2000:] for path in out.glob("*.log")}
    assert ran.returncode == 0, f"{ran.stdout[-3000:]}\n{ran.stderr[-2000:]}\n{logs}"
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary) == [stage.name for stage in stages.STAGES]
    for name, result in summary.items():
        wanted = "not run" if name in NEED_A_GPU else "passed"
        assert result["status"] == wanted, (name, result["reason"], logs.get(f"{name}.log"))
        if name in NEED_A_GPU:
            assert result["reason"]
    assert summary["tests"]["reason"].startswith("no GPU: ")
    decode = summary["decode"]["data"]["decode"]
    assert [found["asked"] for found in decode] == [1, 4, 16]
    assert all(0 < found["mean_batch"] <= found["asked"] for found in decode)
    moves = summary["vmm"]["data"]["moves"]
    assert moves["events"]["inflate"] >= len(moves["inflate_ms"]) == 4
    assert set(summary["offline"]["data"]["policies"]) == {"static", "elastic", "static-chunked"}
    assert (out / "offline.png").stat().st_size > 1000
    assert (out / "decode.png").stat().st_size > 1000
    # The table comes last.
    assert ran.stdout.rstrip().endswith((out / "summary.txt").read_text().rstrip())
    assert not any(row["bar"] for result in summary.values() for row in result["rows"])
    assert "not run: no GPU" in (out / "summary.txt").read_text()


_STUBS = {
    "works": "job.report.judges = True; job.report.add('it', '1', 'at least 1', True)",
    "fails": "job.report.add('before', '2'); raise RuntimeError('on purpose')",
    "dies": "import os; os._exit(3)",
    "cannot": "from gpu_check_lib.report import NotRun; raise NotRun('no such thing')",
    "hangs": (
        "import subprocess, sys, time; job.report.add('before', '3'); "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        "open(job.out / 'child', 'w').write(str(child.pid)); time.sleep(600)"
    ),
}


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """Stages that behave in every way."""
    package = tmp_path / "stubs"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for name, body in _STUBS.items():
        code = "from gpu_check_lib.report import main\n\n\ndef stage(job):\n"
        (package / f"{name}.py").write_text(f"{code}    {body}\n\n\nmain(stage)\n")
    given = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path)] + [given] * bool(given)))
    return [Stage(name, "a stub", 20 if name != "hangs" else 3) for name in _STUBS]


def test_stages_that_fail_hang_or_die_hide_no_others(stubs, tmp_path, capsys):
    out = tmp_path / "out"
    begin = time.monotonic()
    assert run.run_all(stubs, out, dry_run=True, package="stubs") == 1
    assert time.monotonic() - begin < 40
    found = json.loads((out / "summary.json").read_text())
    assert {name: result["status"] for name, result in found.items()} == {
        "works": "passed",
        "fails": "failed",
        "dies": "failed",
        "cannot": "not run",
        "hangs": "out of time",
    }
    assert found["fails"]["reason"] == "RuntimeError: on purpose"
    assert found["fails"]["rows"][0]["what"] == "before"
    assert found["hangs"]["rows"][0]["value"] == "3"
    child = int((out / "child").read_text())
    status = Path(f"/proc/{child}/status")
    alive = status.exists() and "State:\tZ" not in status.read_text()
    assert not alive, "what a stage started outlives it"
    said = capsys.readouterr().out
    assert "bars met: 1 of 1" in said
    assert "+ it" in said


def test_a_run_whose_stages_pass_or_cannot_run_succeeds(stubs, tmp_path):
    fine = [stage for stage in stubs if stage.name in ("works", "cannot")]
    assert run.run_all(fine, tmp_path / "out", dry_run=True, package="stubs") == 0


def test_stages_wait_for_a_build(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "SITE", tmp_path / "nothing")
    out = tmp_path / "out"
    assert run.run_all([Stage("facts", "x", 5)], out, dry_run=False) == 0
    found = json.loads((out / "summary.json").read_text())
    assert found["facts"]["status"] == "not run"
    assert "run the stage build" in found["facts"]["reason"]


def test_stages_are_chosen_by_name_and_keep_their_order():
    assert [s.name for s in stages.parse("decode, build")] == ["build", "decode"]
    for text in ("fly", "build,fly", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="there are build"):
            stages.parse(text)
    assert all(stage.budget_s < 600 for stage in stages.STAGES)


def test_a_missed_bar_shows():
    rows = [
        {"what": "a", "value": "50%", "bar": "at least 80%", "met": False},
        {"what": "b", "value": "5", "bar": "", "met": None},
    ]
    text = table.table({"x": {"status": "passed", "reason": "", "rows": rows, "seconds": 2}})
    assert "x a" in text
    assert text.endswith("bars met: 0 of 1\n")
