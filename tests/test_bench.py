"""What is measured when a workload runs, alone and with several policies side by side."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_stub import StubEngine, output

from ellm_jax.bench.compare import compare_offline, table, workload_summary
from ellm_jax.bench.measure import Decoding, Spread, covered_s, median_of
from ellm_jax.bench.offline import run_offline
from ellm_jax.bench.trace_request import TraceRequest, WorkloadError
from ellm_jax.cli import main
from ellm_jax.outputs import RequestMetrics


def test_percentiles_by_hand() -> None:
    spread = Spread.of([float(value) for value in range(101)])
    assert spread == Spread(50.0, 50.0, 90.0, 99.0)
    assert Spread.of([4.0]) == Spread(4.0, 4.0, 4.0, 4.0)
    assert Spread.of([]) == Spread(None, None, None, None)


def test_covered_time_counts_overlaps_once() -> None:
    assert covered_s([]) == 0.0
    assert covered_s([(5.0, 6.0), (1.0, 3.0), (2.0, 4.0), (2.5, 2.75)]) == pytest.approx(4.0)


def test_standing_still_counts_as_decoding() -> None:
    def done(begin_s: float | None, end_s: float | None, tokens: int) -> Any:
        return output([1], tokens, RequestMetrics(0.0, 0.0, begin_s, end_s), "length")

    # Two requests of 11 tokens in a second each: 20 tokens after the first ones.
    together = Decoding.of([done(1.0, 2.0, 11), done(1.0, 2.0, 11)])
    assert (together.tokens, together.seconds, together.tokens_per_s) == (20, 1.0, 20.0)
    in_turn = Decoding.of([done(1.0, 2.0, 11), done(2.0, 3.0, 11)])
    assert in_turn.tokens_per_s == 10.0
    # The first token early, and the rest only after a pause of two seconds.
    paused = Decoding.of([done(1.0, 4.0, 11), done(1.0, 2.0, 11)])
    assert paused.tokens_per_s == pytest.approx(20 / 3)
    # The time in between, in which nobody decodes, is left out.
    apart = Decoding.of([done(1.0, 2.0, 11), done(5.0, 6.0, 11), done(8.0, 9.0, 1)])
    assert apart.seconds == 2.0
    assert Decoding.of([done(None, None, 0)]).tokens_per_s == 0.0


def test_medians_are_taken_figure_by_figure() -> None:
    runs = [
        {"a": 1, "b": {"c": 9.0, "d": None}, "e": "x", "f": True},
        {"a": 5, "b": {"c": 3.0, "d": 4.0}, "e": "y", "f": False},
        {"a": 2, "b": {"c": 6.0, "d": 8.0}, "e": "z", "f": True},
    ]
    assert median_of(runs) == {"a": 2, "b": {"c": 6.0, "d": 6.0}, "e": "x", "f": True}


def test_policies_take_turns_in_fresh_engines() -> None:
    made: list[tuple[str, StubEngine]] = []

    def make(policy: str) -> StubEngine:
        assert all(engine.closed for _, engine in made), "two engines at a time"
        made.append((policy, StubEngine(prefill_s=0.01 if policy == "slow" else 0.002)))
        return made[-1][1]

    requests = [TraceRequest(0.0, 600, 3, prefix=(4,)), TraceRequest(0.01, 4, 2)]
    results = compare_offline(make, ["slow", "fast"], requests, repeats=3, seed=5)
    assert [policy for policy, _ in made] == ["slow", "fast"] * 3
    for _, engine in made:
        *warm_up, first, second = [asked["prompt"] for asked in engine.asked]
        assert [len(first), len(second)] == [600, 4]
        assert not {first, second} & set(warm_up), "measured prompts were seen before"
        assert [(asked["tokens"]) for asked in engine.asked] == [3, 2, 3, 2]
        assert engine.calls == ["warm_up", "trim", "reset_stats"]
    assert len({engine.asked[-1]["prompt"] for _, engine in made}) == 1
    slow, fast = results["slow"].median, results["fast"].median
    assert slow["total_tokens_per_s"] < fast["total_tokens_per_s"]
    assert slow["total_tokens_per_s"] == pytest.approx(609 / slow["wall_s"], rel=0.5)
    assert slow["completed"] == 2
    assert (slow["prompt_tokens"], slow["output_tokens"]) == (604, 5)
    assert slow["moves"] == {
        **dict.fromkeys(("deflate", "offload", "fetch", "evict", "preempt"), 0),
        "inflate": 2,
    }
    assert len(results["slow"].to_dict()["runs"]) == 3
    assert results["slow"].cost == {"fixed_s": 0.01}
    timeline = results["fast"].timeline
    assert len(timeline["events"]) == 2, "events of the warm-up are among them"
    assert set(timeline["owners"]) >= {"kv", "activation", "weights"}
    assert len(timeline["time_s"]) == len(timeline["owners"]["kv"]) >= 2
    shown = table({"slow": slow, "fast": fast}).splitlines()
    assert shown[0].split() == ["slow", "fast"]
    assert any(line.split() == ["inflations", "2", "2"] for line in shown)


def test_a_summary_says_what_was_asked() -> None:
    requests = [TraceRequest(0.0, n, 10 * n) for n in (3, 9, 4)]
    assert workload_summary(requests) == {
        "requests": 3,
        "prompt_tokens": [3, 4, 9],
        "output_tokens": [30, 40, 90],
    }


def test_a_workload_runs_in_real_time_and_is_measured(
    tiny_checkpoint: Callable[..., Path], make_engine: Callable[..., Any]
) -> None:
    engine = make_engine(
        tiny_checkpoint("llama"), device_memory="8MiB", max_num_seqs=4, max_batch_tokens=32
    )
    requests = [
        TraceRequest(0.0, 20, 9),
        TraceRequest(0.0, 40, 5),
        TraceRequest(0.1, 5, 1),
        TraceRequest(0.6, 3, 4, token_ids=(7, 8, 9)),
    ]
    result, remarks = run_offline(engine, requests, seed=3)
    assert remarks.errors == ()
    assert remarks.compile_s < 0.001, "something was compiled while the clock ran"
    assert result.completed == 4
    assert result.output_tokens == 9 + 5 + 1 + 4
    assert (result.prompt_tokens, result.cached_tokens) == (68, 0)
    assert 0.6 < result.wall_s < 60
    assert result.output_tokens_per_s == pytest.approx(result.output_tokens / result.wall_s)
    assert result.total_tokens_per_s == pytest.approx((68 + 19) / result.wall_s)
    assert result.decoding_tokens_per_s == pytest.approx(15 / result.decoding_s)
    assert 0 < result.decoding_s < result.wall_s
    assert result.decode_step_tokens_per_s > 0
    assert result.ttft_ms.p50 is not None
    assert 0 < result.ttft_ms.p50 < 1000 * result.wall_s
    assert result.tpot_ms.mean is not None
    assert result.tpot_ms.mean > 0
    assert 1 <= result.peak_running <= 4
    assert 0 < result.memory_peak["kv"] <= 8 * 2**20
    assert result.memory_peak["weights"] == engine.memory().weights_bytes
    host = result.host_overhead
    assert all(0 <= share <= 1 for share in (host.planning, host.mapping, host.waiting))
    assert host.planning + host.mapping + host.waiting <= 1
    owners = remarks.timeline["owners"]
    sums = [sum(of_owner) for of_owner in zip(*owners.values(), strict=True)]
    assert set(sums) == {8 * 2**20} == set(remarks.timeline["limit_bytes"])
    assert max(owners["kv"]) <= result.memory_peak["kv"]
    assert all(event["time_s"] >= 0 for event in remarks.timeline["events"])


def test_a_request_that_does_not_fit_is_told_before_anything_runs(
    tiny_checkpoint: Callable[..., Path], make_engine: Callable[..., Any]
) -> None:
    engine = make_engine(tiny_checkpoint("llama"))
    with pytest.raises(WorkloadError, match="max_model_len is 256"):
        run_offline(engine, [TraceRequest(0.0, 5, 5), TraceRequest(0.0, 250, 7)])
    with pytest.raises(WorkloadError, match="request 1 has 1000000000000"):
        run_offline(engine, [TraceRequest(0.0, 10**12, 1)])
    assert engine.stats().steps == 0


FIELDS = ["completed", "output_tokens", "wall_s", "output_tokens_per_s", "ttft_ms", "tpot_ms"]
FIELDS += ["peak_running", "preemptions", "memory_peak", "host_overhead", "prompt_tokens"]
FIELDS += ["cached_tokens", "total_tokens_per_s", "decoding_tokens_per_s", "decoding_s"]
FIELDS += ["decode_step_tokens_per_s", "moves"]


@pytest.fixture
def offline(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> list[str]:
    """`ellm bench offline` with a small workload in tmp_path / "w.jsonl"."""
    lines = [{"prompt_len": 3 + n, "output_len": 2 + n % 3} for n in range(6)]
    workload = tmp_path / "w.jsonl"
    workload.write_text("\n".join(map(json.dumps, lines)))
    command = ["bench", "offline", "--model", str(tiny_checkpoint("llama")), "--quiet", "--json"]
    command += ["--workload", str(workload), "--device-memory", "8MiB", "--max-model-len", "256"]
    command += ["--dtype", "float32", "--max-num-seqs", "4", "--max-batch-tokens", "32"]
    return [*command, "--no-warm-up"]


def test_the_command_writes_the_promised_fields(
    offline: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workload = tmp_path / "w.jsonl"
    lines = workload.read_text()
    workload.write_text(lines + '\n{"prompt_len": 300, "output_len": 1}\n')
    assert main(offline) == 2
    assert "max_model_len is 256" in capsys.readouterr().err
    assert main([*[word for word in offline if word != "--json"], "--max-prompt-len", "100"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["elastic"]
    assert shown[1].split() == ["completed", "7"]
    workload.write_text(lines)
    assert main(offline) == 0
    written = json.loads(capsys.readouterr().out)
    assert list(written) == FIELDS
    assert list(written["ttft_ms"]) == list(written["tpot_ms"]) == ["mean", "p50", "p90", "p99"]
    assert list(written["host_overhead"]) == ["planning", "mapping", "waiting"]
    assert written["completed"] == 6
    assert written["output_tokens"] == sum(2 + n % 3 for n in range(6))


def test_the_command_compares_policies(
    offline: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, cost = tmp_path / "r.json", tmp_path / "cost.json"
    command = [*offline, "--policy", "static-chunked", "--policy", "elastic", "--repeats", "2"]
    command += ["--save", str(saved), "--save-cost", str(cost), "--limit", "4"]
    assert main(command) == 0
    written = json.loads(capsys.readouterr().out)
    assert list(written["policies"]) == ["static-chunked", "elastic"]
    for found in written["policies"].values():
        assert len(found["runs"]) == 2
        assert list(found["median"]) == FIELDS
        assert found["median"]["completed"] == written["workload"]["requests"] == 4
    everything = json.loads(saved.read_text())
    assert everything.pop("timelines").keys() == written["policies"].keys()
    assert everything == written
    assert all(math.isfinite(value) for value in json.loads(cost.read_text()).values())
    offline.remove("--json")
    assert main([*offline, "--limit", "1", "--save", str(tmp_path / "no" / "r.json")]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_the_command_reads_traces(offline: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    samples = Path(__file__).parent / "traces"
    command = [*offline, "--max-prompt-len", "20", "--max-output-len", "3"]
    for name in ("sharegpt.json", "mooncake.jsonl"):
        assert main([*command, "--workload", str(samples / name)]) == 0
        written = json.loads(capsys.readouterr().out)
        assert written["completed"] == {"sharegpt.json": 2, "mooncake.jsonl": 4}[name]
    assert main([*offline, "--workload", str(samples / "burstgpt.csv"), "--format", "azure"]) == 2
    assert "no column 'TIMESTAMP'" in capsys.readouterr().err
