"""Latency targets, rates, and the search for the highest one that is kept."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_stub import StubEngine

from ellm_jax.bench.goodput import Question, measure_online, online_table
from ellm_jax.bench.online import Load, highest_rate, run_rate
from ellm_jax.bench.slo_targets import Latencies, length_class, strictest, uncontended
from ellm_jax.bench.trace_request import TraceRequest, WorkloadError
from ellm_jax.cli import main
from ellm_jax.outputs import RequestMetrics


def test_length_classes_are_powers_of_two() -> None:
    lengths = [1, 2, 3, 4, 5, 512, 513, 16384]
    assert [length_class(n) for n in lengths] == [1, 2, 4, 4, 8, 512, 1024, 16384]


def test_targets_follow_the_shortest_latency_of_all() -> None:
    one, other = Latencies({8: 10.0, 16: 40.0}, 3.0), Latencies({8: 12.0, 16: 30.0}, 2.0)
    shortest = strictest([one, other])
    assert shortest == Latencies({8: 10.0, 16: 30.0}, 2.0)
    assert shortest.targets(25) == Latencies({8: 250.0, 16: 750.0}, 50.0)
    assert shortest.targets(25, ttft_ms=99) == Latencies({8: 99, 16: 99}, 50.0)
    assert shortest.targets(2, tpot_ms=7) == Latencies({8: 20.0, 16: 60.0}, 7)


@pytest.mark.parametrize(
    ("first_s", "end_s", "tokens", "met"),
    [
        (0.1, 1.0, 10, True),
        (0.101, 1.0, 10, False),  # 101 ms to the first token
        (0.1, 1.01, 10, False),  # 101.1 ms per token after it
        (0.1, 0.1, 1, True),  # no token after the first
        (None, 0.1, 0, False),
        (0.1, None, 3, False),
    ],
)
def test_both_targets_count(first_s, end_s, tokens, met) -> None:
    targets = Latencies({8: 100.0}, 100.0)
    request = TraceRequest(0.0, 7, 10)
    metrics = RequestMetrics(5.0, 5.0, first_s, end_s, output_tokens=tokens)
    assert targets.met_by(request, 0.0, metrics) == met
    assert targets.longest_ms(request) == 1000.0


def test_latency_alone_by_class() -> None:
    with StubEngine(prefill_s=0.02, token_s=0.01) as engine:
        requests = [TraceRequest(0.0, n, 4, prefix=(1,)) for n in (5, 7, 8, 600)]
        found = uncontended(engine, requests, seed=0)
    assert set(found.ttft_ms) == {8, 1024}
    assert found.ttft_ms[8] == pytest.approx(20, abs=15)
    assert found.tpot_ms == pytest.approx(10, abs=7)
    prompts = [asked["prompt"] for asked in engine.asked]
    assert [len(prompt) for prompt in prompts] == [7] * 3 + [600] * 3
    assert len(set(prompts)) == 6, "a prompt came twice: its prefix may be cached"


@pytest.mark.parametrize("limit", [0.07, 0.9, 1.0, 7.7, 3000.0])
def test_the_highest_rate_is_found(limit: float) -> None:
    tried: list[float] = []

    def sustains(rate: float) -> bool:
        tried.append(rate)
        return rate <= limit

    found = highest_rate(sustains, 1.0, tolerance=0.1)
    assert found <= limit <= found * 1.1
    assert len(tried) < 20
    assert len(set(tried)) == len(tried), "a rate was tried twice"


def test_a_search_ends() -> None:
    assert highest_rate(lambda _: False, 1.0, 0.1) == 0.0
    found = highest_rate(lambda _: True, 1.0, 0.1)
    assert 1000 < found < math.inf


def test_load_counts_requests_by_the_time_they_take() -> None:
    requests = [TraceRequest(at_s, 3, 2) for at_s in (0.0, 1.0, 1.0, 4.0)]
    load = Load(requests, duration_s=10.0, min_requests=6, poisson=False)
    assert len(load.at(0.1, seed=0)) == 6
    slow, fast = load.at(2.0, seed=0), load.at(4.0, seed=0)
    assert (len(slow), len(fast)) == (20, 40)
    assert slow[-1].arrival_s == pytest.approx(19 / 2.0)
    assert [r.arrival_s for r in slow[:4]] == pytest.approx(
        [2 * r.arrival_s for r in fast[:4]], rel=0.2
    )
    poisson = Load(requests, 10.0, 6, poisson=True)
    assert poisson.at(2.0, seed=1) == poisson.at(2.0, seed=1) != poisson.at(2.0, seed=2)
    with pytest.raises(WorkloadError, match="all arrive at once"):
        Load(requests[1:3], 10.0, 2, poisson=False).at(1.0, seed=0)


def test_a_rate_that_is_kept_up_with() -> None:
    targets = Latencies({4: 1000.0}, 1000.0)
    with StubEngine() as engine:
        requests = Load([TraceRequest(0.0, 4, 3)], 0.5, 1, poisson=True).at(20.0, seed=0)
        result = run_rate(engine, requests, 20.0, targets, salt="a", needed=0.9)
    assert (result.requests, result.completed, result.attainment) == (10, 10, 1.0)
    assert not result.stopped_early
    assert 3 < result.ttft_ms.p50 < 500
    assert 1 < result.tpot_ms.mean < 500
    assert {a["cache_salt"] for a in engine.asked} == {"a"}
    assert {a["ttft_ms"] for a in engine.asked} == {1000.0}
    assert len({a["prompt"] for a in engine.asked}) == 10


def test_a_rate_that_is_too_high_is_given_up_early() -> None:
    # 50 requests of 60 ms in half a second: most would be over only after three.
    targets = Latencies({4: 100.0}, 100.0)
    requests = Load([TraceRequest(0.0, 4, 2)], 0.5, 1, poisson=True).at(100.0, seed=0)
    with StubEngine(prefill_s=0.03, token_s=0.03) as engine:
        begin_s = time.monotonic()
        result = run_rate(engine, requests, 100.0, targets, salt="b", needed=0.9)
        assert time.monotonic() - begin_s < 2.5
    assert result.stopped_early
    assert result.attainment < 0.9
    assert result.completed < result.requests == 50
    # Without a need to meet, all are served, late as they are.
    with StubEngine(prefill_s=0.02, token_s=0.0) as engine:
        requests = requests[:20]
        result = run_rate(engine, requests, 100.0, Latencies({4: 1.0}, 1.0), salt="c")
    assert (result.completed, result.attainment, result.stopped_early) == (20, 0.0, False)


def test_policies_side_by_side() -> None:
    engines: list[StubEngine] = []
    speeds = {"slow": 0.03, "fast": 0.005}

    def make(policy: str) -> StubEngine:
        assert all(engine.closed for engine in engines), "two engines at a time"
        engines.append(StubEngine(prefill_s=speeds[policy], token_s=0.001))
        return engines[-1]

    question = Question(
        Load([TraceRequest(0.0, 4, 1)], duration_s=0.4, min_requests=4, poisson=True),
        rates=(10.0,),
        factor=20.0,
        tolerance=1.0,
        repeats=2,
    )
    report = measure_online(make, list(speeds), question)
    # Two to measure latencies alone, then two rounds.
    assert len(engines) == 6
    assert all(engine.calls.count("warm_up") == 1 for engine in engines)
    assert report.targets.ttft_ms[4] == pytest.approx(20 * report.uncontended["fast"].ttft_ms[4])
    medians = report.medians()
    assert medians["fast"]["rates"]["10"]["attainment"] >= 0.9
    # They could serve 200 and 33 a second; the targets leave the slow one less.
    assert medians["fast"]["goodput_per_s"] > 1.5 * medians["slow"]["goodput_per_s"]
    assert [len(runs) for runs in report.runs.values()] == [2, 2]
    written = report.to_dict()
    assert set(written) == {"uncontended", "slo", "policies"}
    assert set(written["policies"]["slow"]) == {"median", "runs"}
    text = online_table(report)
    assert "goodput req/s" in text
    assert "at 10 requests/s" in text


def test_no_rate_above_one_that_was_missed() -> None:
    prefill_s = {"slow": 0.1, "fast": 0.001}
    question = Question(
        # Eight at once: the slow one's last waits 0.8 s, the fast one's 8 ms.
        Load([TraceRequest(0.0, 4, 1)], duration_s=0.01, min_requests=8, poisson=True),
        rates=(400.0, 200.0, 800.0),
        stop_at_miss=True,
        sweep=False,
        ttft_ms=250.0,
        tpot_ms=1e6,
        repeats=2,
    )
    report = measure_online(lambda p: StubEngine(prefill_s[p], 0.001), list(prefill_s), question)
    assert [[r.rate_per_s for r in run.rates] for run in report.runs["slow"]] == [[200.0]] * 2
    assert [[r.rate_per_s for r in run.rates] for run in report.runs["fast"]] == [
        [200.0, 400.0, 800.0]
    ] * 2
    medians = report.medians()
    assert (medians["slow"]["goodput_per_s"], medians["fast"]["goodput_per_s"]) == (0.0, 800.0)
    assert {rate: m["rounds"] for rate, m in medians["fast"]["rates"].items()} == {
        "200": 2,
        "400": 2,
        "800": 2,
    }
    blocks = online_table(report).split("\n\n")
    assert "slow" in blocks[2]
    assert "at 200 requests/s" in blocks[2]
    assert "slow" not in blocks[3]
    assert "at 400 requests/s" in blocks[3]


def test_requests_that_are_too_long_are_told() -> None:
    question = Question(Load([TraceRequest(0.0, 5000, 2)], 1.0, 1, poisson=True))
    with pytest.raises(WorkloadError, match="max_model_len is 4096"):
        measure_online(lambda _: StubEngine(), ["elastic"], question)


def test_the_command(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "o.json"
    command = ["bench", "online", "--model", str(tiny_checkpoint("llama")), "--quiet"]
    command += ["--device-memory", "8MiB", "--max-num-seqs", "4", "--max-batch-tokens", "32"]
    command += ["--no-warm-up", "--rate", "40", "--duration", "0.2", "--min-requests", "6"]
    command += ["--ttft-ms", "1e6", "--tpot-ms", "1e6", "--save", str(saved)]
    trace = Path(__file__).parent / "traces" / "azure_2023.csv"
    command += ["--workload", str(trace), "--max-prompt-len", "9", "--max-output-len", "3"]
    assert main([*command, "--json", "--arrivals", "trace"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert json.loads(saved.read_text()) == written
    assert written["slo"] == {"ttft_ms": {"16": 1e6}, "tpot_ms": 1e6}
    assert 0 < written["uncontended"]["elastic"]["ttft_ms"]["16"] < 1e5
    found = written["policies"]["elastic"]["median"]
    assert found["goodput_per_s"] == 40.0
    assert found["rates"]["40"]["completed"] == found["rates"]["40"]["requests"] == 8
    assert written["policies"]["elastic"]["runs"][0]["tried"] == []
    assert main(["bench", "online", "--arrivals", "trace"]) == 2
    assert "needs a file" in capsys.readouterr().err
