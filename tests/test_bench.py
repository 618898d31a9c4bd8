"""Workloads, and what is measured when one runs."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ellm_jax.bench.offline import Spread, run_offline, table
from ellm_jax.bench.workload import (
    Arrival,
    WorkloadError,
    make_workload,
    read_workload,
    workload_lines,
)
from ellm_jax.cli import main


def test_a_workload_survives_writing_and_reading() -> None:
    made = list(make_workload(40, (3, 9), (1, 4), 10.0, seed=4))
    assert read_workload(workload_lines(made)) == made
    assert made == list(make_workload(40, (3, 9), (1, 4), 10.0, seed=4))
    assert made != list(make_workload(40, (3, 9), (1, 4), 10.0, seed=5))
    assert {a.prompt_len for a in made} == set(range(3, 10))
    assert {a.output_len for a in made} == set(range(1, 5))
    # The mean of 40 exponential pauses of 0.1 s is within a factor of two of it.
    assert 2 < made[-1].arrival_s < 8


def test_without_a_rate_all_arrive_at_once() -> None:
    assert {a.arrival_s for a in make_workload(9, (1, 2), (1, 2), None, seed=0)} == {0.0}


def test_lines_are_sorted_by_arrival_and_ids_are_kept() -> None:
    lines = [
        '{"arrival_s": 2, "prompt_len": 3, "output_len": 4}',
        "",
        '{"prompt_token_ids": [5, 6], "output_len": 1}',
    ]
    first, second = read_workload(lines)
    assert first == Arrival(0.0, 2, 1, (5, 6))
    assert first.prompt(512, 0, 0) == [5, 6]
    assert second == Arrival(2.0, 3, 4)
    prompt = second.prompt(512, 7, 1)
    assert len(prompt) == 3
    assert all(0 <= token < 512 for token in prompt)
    assert prompt == second.prompt(512, 7, 1) != second.prompt(512, 8, 1)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1"),
        ("[]", "not a JSON object"),
        ('{"output_len": 3}', "one of prompt_len"),
        ('{"prompt_len": 3, "prompt_token_ids": [1, 2, 3], "output_len": 3}', "one of prompt_len"),
        ('{"prompt_len": 0, "output_len": 3}', "prompt_len=0"),
        ('{"prompt_len": 3}', "output_len=None"),
        ('{"prompt_len": 3, "output_len": true}', "output_len=True"),
        ('{"prompt_token_ids": ["a"], "output_len": 3}', "prompt_token_ids"),
        ('{"prompt_token_ids": [], "output_len": 3}', "prompt_len=0"),
        ('{"prompt_len": 3, "output_len": 3, "arrival_s": -1}', "arrival_s=-1"),
        ('{"prompt_len": 3, "output_len": 3, "arrival_s": NaN}', "arrival_s=nan"),
        ('{"prompt_len": 3, "output_len": 3, "arival_s": 1}', "'arival_s'"),
        (f'{{"prompt_len": 3, "output_len": 3, "arrival_s": {10**400}}}', "arrival_s=1000"),
        ("[" * 100_000, "line 1"),
    ],
)
def test_a_bad_line_is_named(line: str, said: str) -> None:
    with pytest.raises(WorkloadError) as caught:
        read_workload([line])
    assert said in str(caught.value)


def test_an_empty_workload_is_refused() -> None:
    with pytest.raises(WorkloadError, match="empty"):
        read_workload(["", "\n"])


def test_percentiles_by_hand() -> None:
    spread = Spread.of([float(value) for value in range(101)])
    assert spread == Spread(50.0, 50.0, 90.0, 99.0)
    assert Spread.of([4.0]) == Spread(4.0, 4.0, 4.0, 4.0)
    assert Spread.of([]) == Spread(None, None, None, None)


def test_a_workload_runs_in_real_time_and_is_measured(
    tiny_checkpoint: Callable[..., Path], make_engine: Callable[..., Any]
) -> None:
    engine = make_engine(
        tiny_checkpoint("llama"), device_memory="8MiB", max_num_seqs=4, max_batch_tokens=32
    )
    arrivals = [
        Arrival(0.0, 20, 9),
        Arrival(0.0, 40, 5),
        Arrival(0.1, 5, 1),
        Arrival(0.6, 3, 4, (7, 8, 9)),
    ]
    result, remarks = run_offline(engine, arrivals, seed=3)
    assert remarks.errors == ()
    assert remarks.compile_s < 0.001, "something was compiled while the clock ran"
    assert result.completed == 4
    assert result.output_tokens == 9 + 5 + 1 + 4
    assert 0.6 < result.wall_s < 60
    assert result.output_tokens_per_s == pytest.approx(result.output_tokens / result.wall_s)
    assert result.ttft_ms.p50 is not None
    assert 0 < result.ttft_ms.p50 < 1000 * result.wall_s
    assert result.tpot_ms.mean is not None
    assert result.tpot_ms.mean > 0
    assert 1 <= result.peak_running <= 4
    assert 0 < result.memory_peak["kv"] <= 8 * 2**20
    assert result.memory_peak["weights"] == engine.memory().weights_bytes
    shares = dataclasses.astuple(result.host_overhead)
    assert all(0 <= share <= 1 for share in shares)
    assert sum(shares) <= 1
    assert "completed      4" in table(result)


def test_a_request_that_does_not_fit_is_told_before_anything_runs(
    tiny_checkpoint: Callable[..., Path], make_engine: Callable[..., Any]
) -> None:
    engine = make_engine(tiny_checkpoint("llama"))
    with pytest.raises(WorkloadError, match="max_model_len is 256"):
        run_offline(engine, [Arrival(0.0, 5, 5), Arrival(0.0, 250, 7)])
    with pytest.raises(WorkloadError, match="request 1 has 1000000000000"):
        run_offline(engine, [Arrival(0.0, 10**12, 1)])
    assert engine.stats().steps == 0


def test_the_command_writes_the_promised_fields(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "workload", "--requests", "6", "--prompt-len", "3:9"]) == 0
    workload = tmp_path / "w.jsonl"
    workload.write_text(capsys.readouterr().out)
    command = ["bench", "offline", "--model", str(tiny_checkpoint("llama")), "--quiet", "--json"]
    command += ["--workload", str(workload), "--device-memory", "8MiB", "--max-model-len", "256"]
    command += ["--dtype", "float32", "--max-num-seqs", "4", "--max-batch-tokens", "32"]
    command += ["--no-warm-up"]
    workload.write_text(workload.read_text() + '{"prompt_len": 300, "output_len": 1}\n')
    assert main(command) == 2
    assert "max_model_len is 256" in capsys.readouterr().err
    lines = workload.read_text().splitlines()[:-1]
    workload.write_text("\n".join(lines))
    assert main(command) == 0
    written = json.loads(capsys.readouterr().out)
    assert list(written) == [
        "completed",
        "output_tokens",
        "wall_s",
        "output_tokens_per_s",
        "ttft_ms",
        "tpot_ms",
        "peak_running",
        "preemptions",
        "memory_peak",
        "host_overhead",
    ]
    assert list(written["ttft_ms"]) == list(written["tpot_ms"]) == ["mean", "p50", "p90", "p99"]
    assert list(written["host_overhead"]) == ["planning", "mapping", "waiting"]
    assert written["completed"] == 6
    assert written["output_tokens"] == sum(json.loads(line)["output_len"] for line in lines)
