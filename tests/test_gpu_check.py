"""scripts/gpu_check, as far as it goes without a GPU."""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "scripts"))

from gpu_check_lib import (  # noqa: E402  # found by the line above
    build,
    decode,
    inside,
    offline,
    policies,
    pytests,
    run,
    sanitizer,
    stages,
    table,
    tools,
)
from gpu_check_lib.report import Job, NotRun, Report  # noqa: E402
from gpu_check_lib.sizes import sizes  # noqa: E402
from gpu_check_lib.stages import Stage  # noqa: E402

from ellm_jax import SamplingParams  # noqa: E402
from ellm_jax._native import Copier, HostBuffer  # noqa: E402
from ellm_jax.devices.allocator import ENVIRONMENT  # noqa: E402

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
    assert len(summary["vmm"]["data"]["uneven"]) == len(sizes(dry_run=True).uneven)
    measured = summary["offline"]["data"]["policies"]
    assert set(measured) == {"static", "elastic", "static-chunked"}
    for policy, found in measured.items():
        assert not found["problems"], policy
        assert found["capacity"], policy
        assert [run["compile_s"] for run in found["workloads"].values()] == [0], policy
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


def test_where_little_time_is_left_something_is_kept_for_later_stages(stubs, tmp_path, monkeypatch):
    out = tmp_path / "out"
    hangs, works = Stage("hangs", "a stub", 60), Stage("works", "a stub", 20, least_s=8)
    assert run.run_all([works], out, dry_run=True, within_s=10, package="stubs") == 0
    found = json.loads((out / "summary.json").read_text())
    assert found["works"]["status"] == "not run"
    assert found["works"]["reason"] == "no time was left"
    monkeypatch.setattr(run, "_LEAST_S", 1.0)
    begin = time.monotonic()
    run.run_all([hangs, works], out, dry_run=True, within_s=11, package="stubs")
    assert time.monotonic() - begin < 11
    found = json.loads((out / "summary.json").read_text())
    assert [result["status"] for result in found.values()] == ["out of time", "passed"]
    assert found["hangs"]["seconds"] < 5


def test_half_an_hour_has_room_for_the_least_of_every_stage():
    named = set()
    for names in stages.THREE_RUNS:
        chosen = stages.parse(names)
        assert sum(stage.least_s for stage in chosen) < 540
        assert f"--pack OUT --stages {names}\n" in (REPO / "docs" / "cuda.md").read_text()
        named |= {stage.name for stage in chosen}
    assert named == {stage.name for stage in stages.STAGES}


def test_what_was_found_comes_back_in_three_files(stubs, tmp_path):
    pack = tmp_path / "pack"
    chosen = [stage for stage in stubs if stage.name in ("works", "dies")]
    run.run_all(chosen, tmp_path / "out", dry_run=True, pack=pack, package="stubs")
    assert {path.name for path in pack.iterdir()} == {
        "summary.txt",
        "summary.json",
        "everything.tar.gz",
    }
    with tarfile.open(pack / "everything.tar.gz") as archive:
        assert {"works.json", "works.log", "dies.log"} <= set(archive.getnames())


def test_jax_has_the_engines_allocator_whoever_uses_it_first():
    assert ENVIRONMENT.items() <= run.environment(dry_run=False).items()
    assert run.ALLOCATOR == ENVIRONMENT
    given = {name: value for name, value in os.environ.items() if name in ENVIRONMENT}
    in_a_dry_run = run.environment(dry_run=True)
    assert {n: v for n, v in in_a_dry_run.items() if n in ENVIRONMENT} == given


def test_a_run_that_can_build_nothing_fails(tmp_path, monkeypatch):
    package = tmp_path / "stubs"
    package.mkdir()
    (package / "__init__.py").write_text("")
    code = "from gpu_check_lib.report import NotRun, main\n\n\ndef stage(job):\n"
    (package / "build.py").write_text(f"{code}    raise NotRun('no nvcc')\n\n\nmain(stage)\n")
    given = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path)] + [given] * bool(given)))
    monkeypatch.setattr(run, "SITE", tmp_path / "nothing")
    chosen = [Stage("build", "a stub", 20, needs_build=False), Stage("facts", "x", 5)]
    assert run.run_all(chosen, tmp_path / "out", dry_run=False, package="stubs") == 1
    assert run.run_all(chosen[:1], tmp_path / "out", dry_run=True, package="stubs") == 0


def test_cudas_programs_are_found_off_the_path(tmp_path, monkeypatch):
    for name in ("nvcc", "compute-sanitizer"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setattr(tools, "_USUAL", Path("/nowhere"))
    assert tools.cuda_tool("nvcc") is None
    monkeypatch.setattr(tools, "_USUAL", tmp_path)
    assert tools.cuda_tool("nvcc") == str(tmp_path / "nvcc")
    monkeypatch.setattr(tools, "_USUAL", Path("/nowhere"))
    monkeypatch.setenv("CUDACXX", str(tmp_path / "nvcc"))
    assert tools.cuda_tool("compute-sanitizer") == str(tmp_path / "compute-sanitizer")


def test_a_build_is_known_by_its_sources(tmp_path):
    for name in ("CMakeLists.txt", "xla_ffi/kernel.cu", "ellm_jax/__pycache__/x.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    before = build.fingerprint(tmp_path)
    (tmp_path / "ellm_jax/__pycache__/x.pyc").write_text("y")
    assert build.fingerprint(tmp_path) == before
    (tmp_path / "xla_ffi/kernel.cu").write_text("y")
    assert build.fingerprint(tmp_path) != before


def job_of(tmp_path: Path, *, left_s: float = 100.0, judges: bool = False) -> Job:
    report = Report(tmp_path / "stage.json", judges=judges)
    ends_s = time.monotonic() + left_s
    return Job(report, tmp_path, tmp_path, tmp_path / "build", True, ends_s)


def test_tests_end_with_what_was_found_when_the_time_is_over(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    (tmp_path / "test_some.py").write_text(
        "".join(f"def test_{i}():\n    pass\n" for i in range(5))
    )
    monkeypatch.setenv("PYTHONPATH", str(REPO / "scripts"))
    whole = job_of(tmp_path)
    pytests.run_pytest(whole, "test_some.py")
    assert whole.report.rows[-1].value == "5, 0 skipped"
    late = job_of(tmp_path, left_s=0.0)
    with pytest.raises(RuntimeError, match="time for 1 tests only"):
        pytests.run_pytest(late, "test_some.py")
    assert late.report.rows[-1].value == "1, 0 skipped, no time for the rest"
    (tmp_path / "test_some.py").write_text("def test_0():\n    assert False\n")
    with pytest.raises(RuntimeError, match="1 tests failed"):
        pytests.run_pytest(job_of(tmp_path), "test_some.py")


@pytest.mark.parametrize("tool", sanitizer.TOOLS)
def test_the_sanitizers_tests_are_there(tool):
    command = [sys.executable, "-P", "-m", "pytest", "--collect-only", "-q", "-m", "gpu"]
    command += ["-k", sanitizer.selection(tool), "tests/gpu/test_kernels.py"]
    ran = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    found = [line for line in ran.stdout.splitlines() if "::" in line]
    for part in sanitizer.TOOLS[tool]:
        assert any(part.split(" and ")[0] in line for line in found), (part, ran.stdout)
    assert len(found) == 3 if tool != "memcheck" else 3 < len(found) < 40


def test_a_part_of_decode_that_fails_hides_no_other(tmp_path, monkeypatch):
    from ellm_jax.bench import cuda_kernels

    measured: list[object] = []

    def one_batch(job, chosen, batch, bandwidth, *, most):
        if batch == 1:
            raise RuntimeError("on purpose")
        measured.append((batch, most))

    monkeypatch.setattr(cuda_kernels, "copy_rate", lambda count: 1e12)
    monkeypatch.setattr(cuda_kernels, "matrix_rate", lambda size: 1e14)
    monkeypatch.setattr(decode, "_decode", one_batch)
    monkeypatch.setattr(decode, "_prefill", lambda *_: measured.append("prefill"))
    with pytest.raises(RuntimeError, match="decoding, batch 1: RuntimeError: on purpose"):
        decode.stage(job_of(tmp_path))
    assert measured == [(4, False), "prefill", (16, True)]


def test_a_policy_that_was_not_measured_has_missed_its_bars(tmp_path):
    chosen = sizes(dry_run=True)
    job = job_of(tmp_path, judges=True)
    with pytest.raises(NotRun, match="no policy was measured"):
        offline.stage(job)
    measured = {"decoding_tokens_per_s": 10.0, "compile_s": 0.0, "errors": []}
    label = chosen.workloads[0].label
    static = {"workloads": {label: measured}, "capacity": {"batch": 2}}
    broken = {"workloads": {}, "capacity": None}
    offline.compare(job.report, chosen.workloads[0], {"static": static, "elastic": broken})
    offline.compare_batches(job.report, chosen, {"static": static, "elastic": broken})
    ratios = [row for row in job.report.rows if "over static" in row.what]
    assert [(row.value, row.met) for row in ratios] == [("not measured", False)] * 2
    # Figures with compiling in them are told, and not compared.
    slow = {label: measured | {"compile_s": 3.0, "decoding_tokens_per_s": 99.0}}
    elastic = {"workloads": slow, "capacity": {"batch": 9}}
    job.report.rows.clear()
    offline.compare(job.report, chosen.workloads[0], {"static": static, "elastic": elastic})
    offline.compare_batches(job.report, chosen, {"static": static, "elastic": elastic})
    assert any("3.0 s compiling" in row.value for row in job.report.rows)
    ratios = [row for row in job.report.rows if "over static" in row.what]
    assert [(row.value, row.met) for row in ratios] == [("not measured", False), ("4.50", True)]


def test_steps_for_prompts_of_one_length():
    assert policies.prefill_rows(262144, 32768, whole=True) == [32768, 65536, 131072, 262144]
    assert policies.prefill_rows(2048, 8192, whole=False) == [512, 1024, 2048]
    assert policies.prefill_rows(512, 8192, whole=False) == [512]
    assert policies.prefill_rows(300, 64, whole=False) == [300]


def test_nothing_compiles_beside_what_is_measured(tiny_checkpoint, make_engine):
    engine = make_engine(tiny_checkpoint("llama"))
    inside.use_steps(engine, [(8, 8), (64, 8)])
    shapes = set(inside.shapes_of(engine))
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    engine.generate([[i + 3] * (5 + 9 * i) for i in range(6)], params)
    inside.wait_for_compiler(engine)
    assert set(inside.shapes_of(engine)) == shapes
    assert engine.stats().compile_s == 0


def test_chunks_that_nobody_wrote_to_are_numbers(tiny_checkpoint, make_engine):
    engine = make_engine(tiny_checkpoint("llama"), prefix_caching=False)
    ledger = engine._loop.ledger
    size = ledger.chunk_bytes
    buffer, copier = HostBuffer(size, 2 * size), Copier()
    ones, got = buffer.take(2)
    ctypes.memset(buffer.address(ones), 0xFF, size)

    def through_all(copy) -> int:
        """Calls copy(slot, tile) for the chunks that there are."""
        slots, count = [], 0
        tile, chunks = ledger.tile_tokens, ledger.chunks_for(ledger.kv.layout.max_tokens)
        for _ in range(ledger.kv.layout.num_slots):
            slots.append(ledger.open_slot(tile))
            ledger.extend(slots[-1], ledger.kv.layout.max_tokens)
            for at in range(chunks):
                copier.wait(copy(slots[-1], at))
            count += chunks
        for slot in slots:
            ledger.release(slot)
        return count

    def spoil(slot: int, at: int) -> int:
        return copier.fetch(ledger.kv, slot, at, buffer, [ones])

    def look(slot: int, at: int) -> int:
        ticket = copier.offload(ledger.kv, slot, at, buffer, [got])
        copier.wait(ticket)
        assert not any(ctypes.string_at(buffer.address(got), size))
        return ticket

    assert inside.on_thread(engine, lambda: through_all(spoil)) > 8
    inside.clear_memory(engine)
    assert inside.on_thread(engine, lambda: through_all(look)) > 8
    copier.close()
    assert ledger.usage()["kv"] == 0


def test_stages_wait_for_a_build(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "SITE", tmp_path / "nothing")
    out = tmp_path / "out"
    assert run.run_all([Stage("facts", "x", 5)], out, dry_run=False) == 0
    found = json.loads((out / "summary.json").read_text())
    assert found["facts"]["status"] == "not run"
    assert "run the stage build" in found["facts"]["reason"]


def test_stages_are_chosen_by_name_and_keep_their_order():
    assert [s.name for s in stages.parse("decode, build")] == ["build", "decode"]
    assert [s.name for s in stages.parse("offline")] == [
        "offline_static",
        "offline_elastic",
        "offline_chunked",
        "offline",
    ]
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
