"""How many threads an engine on the CPU runs. XLA's pool is made once a process: each case has one
of its own."""

import json
import os
import subprocess
import sys

import pytest

from ellm_jax.cli import main
from ellm_jax.config import EngineConfig
from ellm_jax.devices.threads import cpu_quota, usable_cores

_CHILD = """
import json, os, sys
from ellm_jax import Engine, EngineConfig, SamplingParams
from ellm_jax.devices import DeviceError

before = dict(os.environ)
found = {}
for threads in json.loads(sys.argv[1]):
    if threads == "jax":
        import jax
        jax.devices()
        continue
    config = EngineConfig(
        threads=threads, device="cpu", warm_up=False, progress=False, device_memory="64MiB"
    )
    try:
        with Engine.from_pretrained(None, config) as engine:
            [output] = engine.generate([5, 6, 7], SamplingParams(temperature=0.0, max_tokens=4))
            found[str(threads)] = output.token_ids
    except DeviceError as error:
        found[str(threads)] = str(error)
from ellm_jax.runtime import ops
found["pool"] = ops.pool_threads()
found["eigen"] = 0
for task in os.listdir("/proc/self/task"):
    with open(f"/proc/self/task/{task}/comm") as comm:
        found["eigen"] += comm.read().startswith("tf_XLAEigen")
found["unchanged"] = dict(os.environ) == before
print(json.dumps(found))
"""


def run(*threads, **environ):
    """What became of engines with these `threads`, one after the other in one process; "jax" is
    somebody who uses JAX first."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PJRT_NPROC", "NPROC")}
    ended = subprocess.run(
        [sys.executable, "-P", "-c", _CHILD, json.dumps(threads)],
        capture_output=True,
        text=True,
        timeout=300,
        env=clean | environ,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def test_an_engine_runs_on_the_threads_it_was_given():
    found = run(3, None, 3, 2)
    assert found["pool"] == found["eigen"] == 3
    assert found["unchanged"], "what the process starts later gets no variable of ours"
    assert found["3"] == found["None"]
    assert "threads=2" in found["2"]
    assert "runs with 3" in found["2"]
    assert "leave threads out" in found["2"]


def test_without_a_number_it_is_the_cores_that_the_process_may_use():
    assert run(None)["pool"] == usable_cores()


def test_who_has_told_xla_is_heard_unless_the_engine_is_told_too():
    assert run(None, PJRT_NPROC="3")["pool"] == 3
    assert run(1, PJRT_NPROC="3")["pool"] == 1


def test_a_jax_that_runs_already_cannot_change():
    cores = len(os.sched_getaffinity(0))
    found = run("jax", cores + 1, cores)
    assert f"runs with {cores}" in found[str(cores + 1)]
    assert isinstance(found[str(cores)], list)


@pytest.mark.parametrize(
    ("text", "quota"),
    [("150000 100000\n", 1.5), ("max 100000\n", None), ("10000 100000\n", 0.1), ("", None)],
)
def test_a_quota_counts_as_cores(tmp_path, text, quota):
    file = tmp_path / "cpu.max"
    file.write_text(text)
    assert cpu_quota(file) == quota
    there = len(os.sched_getaffinity(0))
    assert usable_cores(file) == (there if quota is None else max(1, min(there, round(quota))))
    assert usable_cores(tmp_path / "missing") == there


@pytest.mark.parametrize("threads", [0, -1, 1025, 2.5, True])
def test_a_number_of_threads_that_cannot_be(threads):
    with pytest.raises((ValueError, TypeError), match=f"threads={threads}"):
        EngineConfig(threads=threads)


def test_the_command_line_has_it(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    assert "--threads" in capsys.readouterr().out
