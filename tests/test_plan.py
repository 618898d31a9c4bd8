"""Sizing a machine: forecasts by hand, against each other, and through the command."""

import dataclasses
import itertools
import json
import random
from pathlib import Path

import pytest

from ellm_jax._native import KvCache, KvLayout, Pool
from ellm_jax.bench.planning import Targets, forecast
from ellm_jax.bench.traces import TraceRequest
from ellm_jax.checkpoint import load_model, read_config, weights_bytes
from ellm_jax.cli import main
from ellm_jax.runtime import ops
from ellm_jax.runtime.runner import Runner
from ellm_jax.runtime.shapes import StepKey, StepMode, StepShape
from ellm_jax.scheduler.cost import CostModel, StepWork
from ellm_jax.scheduler.policy import POLICIES
from ellm_jax.sim.estimates import derived_cost, estimated_need
from ellm_jax.sim.steps import NeedModel
from ellm_jax.sim.world import WorldConfig

TRACES = Path(__file__).parent / "traces"
LAYOUT = KvLayout.choose(4, 4, 64, 2, 4096, 32)
CHUNK = LAYOUT.chunk_bytes
COST = CostModel(1e-3, 1e-5, 1e-9, 1e-8, 1e9)
MACHINE = WorldConfig(
    layout=LAYOUT,
    device_bytes=400 * CHUNK,
    weights_bytes=10 * CHUNK,
    need=NeedModel(CHUNK, CHUNK // 32, 0),
    cost=COST,
    host_step_s=1e-4,
)
# 40 long prompts at once, most of whose KV does not fit together.
HEAVY = [TraceRequest(0.0, 1500, 60, id=str(n)) for n in range(40)]


def on(policy, **change):
    return dataclasses.replace(MACHINE, policy=policy, **change)


def test_one_request_alone_takes_what_the_cost_model_says():
    found = forecast(on("elastic"), [TraceRequest(0.0, 100, 3)], Targets())
    prefill_ms = 1000 * COST.prefill_s(0, 100)
    steps_ms = [1000 * COST.step_s(StepWork.decode(context)) for context in (101, 102)]
    assert found.ttft_ms.mean == pytest.approx(prefill_ms, abs=0.3)
    assert found.tpot_ms.mean == pytest.approx(sum(steps_ms) / 2, rel=0.1)
    assert found.largest_batch == 1
    assert found.attainment == 1.0
    assert found.memory_peak["weights"] == 10 * CHUNK
    assert LAYOUT.chunks_for(102) * CHUNK <= found.memory_peak["kv"]
    assert found.memory_peak["kv"] <= (LAYOUT.chunks_for(102) + 1) * CHUNK


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_serves_everybody(policy):
    found = forecast(on(policy, host_bytes=200 * CHUNK), HEAVY, Targets(1e9, 1e9))
    assert not found.problem
    assert found.attainment == 1.0
    assert found.refused == 0
    whole_s = 40 / found.rate_per_s
    assert found.output_tokens_per_s == pytest.approx(40 * 60 / whole_s)
    assert sum(found.memory_peak[o] for o in ("weights", "kv")) <= MACHINE.device_bytes
    assert 0.5 < found.busy <= 1.0


def test_memory_that_is_not_reserved_serves_more_at_once():
    batches = {p: forecast(on(p), HEAVY, Targets()).largest_batch for p in POLICIES}
    assert batches["elastic"] > 1.3 * batches["static"]


def test_the_host_tier_brings_first_tokens_forward():
    long = [dataclasses.replace(request, output_tokens=300) for request in HEAVY]
    within = forecast(on("intra"), long, Targets())
    beyond = forecast(on("elastic", host_bytes=3000 * CHUNK), long, Targets())
    assert beyond.offloads > 0
    assert beyond.host_peak_bytes > 0
    assert beyond.ttft_ms.mean < 0.8 * within.ttft_ms.mean


@pytest.mark.parametrize(("rate_per_s", "seed"), [(1.3, 7), (1.65, 1), (2.0, 5), (2.5, 4)])
def test_more_load_than_memory_holds_keeps_its_targets(rate_per_s, seed):
    """A crowd whose answers outgrow the device, with host memory for all and targets that leave
    them time to rest: nobody keeps the others from using it."""
    layout = KvLayout.choose(12, 4, 64, 2, 4096, 64)
    machine = WorldConfig(
        layout=layout,
        device_bytes=400 << 20,
        weights_bytes=238 << 20,
        need=NeedModel(2 << 20, 22 << 10, 0),
        cost=CostModel(5.6e-3, 1.7e-4, 2e-7, 8e-7, 1.6e9),
        host_bytes=1 << 30,
    )
    rng = random.Random(seed)
    arrivals = itertools.accumulate(rng.expovariate(rate_per_s) for _ in range(75))
    trace = [TraceRequest(at, rng.randint(512, 1024), 512, id=str(at)) for at in arrivals]
    found = forecast(machine, trace, Targets(ttft_ms=7560, tpot_ms=214), seed=seed)
    assert found.attainment > 0.98


def test_what_cannot_run_is_said_and_not_simulated():
    small = on("static", device_bytes=60 * CHUNK)
    assert "for activations beside" in forecast(small, HEAVY, Targets()).problem
    able = dataclasses.replace(small, policy="elastic")
    found = forecast(able, [*HEAVY[:2], TraceRequest(0.0, 9999, 1)], Targets())
    assert (found.refused, found.requests, found.problem) == (3, 3, "")
    assert found.attainment == 0.0


def test_targets_are_those_given_or_many_times_the_latency_alone():
    request = TraceRequest(0.0, 100, 20)
    ttft_ms, tpot_ms = Targets(factor=2).of(request, MACHINE)
    assert ttft_ms == pytest.approx(2000 * (COST.prefill_s(0, 100) + 1e-4))
    assert tpot_ms == pytest.approx(2000 * (COST.step_s(StepWork.decode(110)) + 1e-4))
    assert Targets(5.0, 6.0).of(request, MACHINE) == (5.0, 6.0)
    assert forecast(on("elastic"), HEAVY, Targets(ttft_ms=1e-6)).attainment == 0.0


def test_goodput_is_a_rate_that_keeps_the_targets():
    trace = [TraceRequest(0.0, 300, 30, id=str(n)) for n in range(60)]
    found = forecast(on("elastic"), trace, Targets(factor=5), goodput=True)
    assert 0 < found.goodput_per_s < 1000 / (1000 * COST.row_s * 300)


def test_shared_blocks_are_prefilled_once():
    trace = [TraceRequest(float(n), 1100, 4, prefix=(7, 8), id=str(n)) for n in range(5)]
    assert forecast(on("elastic"), trace, Targets()).cached_tokens == 4 * 1024
    alone = forecast(on("elastic", prefix_caching=False), trace, Targets())
    assert alone.cached_tokens == 0


def test_needs_are_fitted_by_a_line_without_parts_below_zero():
    line = NeedModel(1000, 300, 20)
    shapes = [StepShape(rows, seqs) for rows in (1, 32, 512) for seqs in (1, 16) if rows >= seqs]
    assert NeedModel.fit({s: line.need_bytes(s) for s in shapes}) == line
    falling = NeedModel.fit({s: 1000 + 300 * s.rows - 5 * s.seqs for s in shapes})
    assert falling.seq_bytes == 0
    assert falling.row_bytes == pytest.approx(300, abs=15)


def test_estimated_needs_are_near_what_xla_says(tiny_checkpoint):
    path = tiny_checkpoint("llama")
    config = read_config(path)
    model, _ = load_model(path, dtype="float32", progress=False)
    layout = KvLayout.choose(
        config.num_layers, config.num_kv_heads, config.head_dim, 4, config.max_context, 4
    )
    kv = KvCache(Pool(layout.chunk_bytes, 1 << 24), layout)
    ops.register()
    runner = Runner(model, config, kv.id, 4, 2)
    estimate = estimated_need(config, 4)
    for shape in (StepShape(4, 4), StepShape(64, 1), StepShape(512, 4)):
        stated = runner.compile(StepKey(shape, StepMode()))
        assert 0.6 < estimate.need_bytes(shape) / stated < 1.7
    kv.close()


def test_a_derived_cost_reads_weights_once_and_multiplies_twice(tiny_checkpoint):
    config = read_config(tiny_checkpoint("llama"))
    token_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    cost = derived_cost(config, 10**9, token_bytes, 1e12, 1e11, 1e10)
    assert cost.fixed_s == pytest.approx(0.01)
    parameters = weights_bytes(config, "float32") / 4 - config.vocab_size * config.hidden_size
    assert cost.row_s == pytest.approx(2 * parameters / 1e12)
    assert cost.decode_pair_s > token_bytes / 1e11


# The command.


@pytest.fixture
def cost_file(tmp_path):
    path = tmp_path / "cost.json"
    path.write_text(json.dumps(COST.to_dict()))
    return str(path)


def plan(*args, capsys):
    code = main(["plan", "--quiet", *args])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize("trace", sorted(path.name for path in TRACES.iterdir()))
def test_every_format_of_trace(trace, cost_file, capsys):
    code, out, err = plan(
        *("--trace", str(TRACES / trace), "--device-memory", "64MiB", "--cost", cost_file),
        *("--max-prompt-len", "200", "--max-output-len", "20", "--json"),
        capsys=capsys,
    )
    assert code == 0, err
    report = json.loads(out)
    assert report["policies"].keys() == POLICIES.keys()
    for found in report["policies"].values():
        assert found["requests"] > 0
        assert found["refused"] == 0
        assert found["rate_per_s"] > 0


def test_a_table_for_people(capsys):
    code, out, _ = plan(
        *("--trace", str(TRACES / "ours.jsonl"), "--device-memory", "64MiB", "--flops", "1e12"),
        *("--bandwidth", "100GB", "--policy", "elastic", "--policy", "static", "--goodput"),
        capsys=capsys,
    )
    assert code == 0
    assert out.splitlines()[0].split() == ["elastic", "static"]
    for row in ("requests/s", "goodput req/s", "largest batch", "TTFT p99 ms", "kv at most"):
        assert f"\n{row} " in out


def test_int8_kv_takes_more_requests_at_once(tmp_path, capsys):
    trace = tmp_path / "trace.jsonl"
    asked = {"arrival_s": 0.0, "prompt_len": 200, "output_len": 50}
    trace.write_text("\n".join([json.dumps(asked)] * 60))
    largest = {}
    for kv_dtype in ("auto", "int8"):
        code, out, err = plan(
            *("--trace", str(trace), "--device-memory", "16MiB", "--flops", "1e12"),
            *("--bandwidth", "100GB", "--policy", "elastic", "--json", "--kv-dtype", kv_dtype),
            capsys=capsys,
        )
        assert code == 0, err
        report = json.loads(out)
        largest[kv_dtype] = report["policies"]["elastic"]["largest_batch"]
    assert largest["int8"] > largest["auto"]


def test_needs_may_come_with_the_cost(tmp_path, capsys):
    path = tmp_path / "cost.json"
    need = {"fixed_bytes": 5, "row_bytes": 6, "seq_bytes": 7}
    path.write_text(json.dumps(COST.to_dict() | {"need": need}))
    code, out, _ = plan(
        *("--trace", str(TRACES / "ours.jsonl"), "--device-memory", "64MiB", "--cost", str(path)),
        *("--policy", "elastic", "--copy-bandwidth", "2GB", "--json"),
        capsys=capsys,
    )
    assert code == 0
    machine = json.loads(out)["machine"]
    assert machine["need"] == need
    assert machine["cost"]["copy_bytes_per_s"] == 2e9


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--device-memory", "64MiB"], "--flops and --bandwidth"),
        (["--device-memory", "64MiB", "--cost", "nowhere.json"], "nowhere.json"),
        (["--device-memory", "10KiB", "--flops", "1", "--bandwidth", "1"], "weights"),
        (["--device-memory", "64MiB", "--cost", str(TRACES / "ours.jsonl")], "--save-cost"),
        (
            ["--device-memory", "64MiB", "--cost", "x.json", "--max-model-len", "999999999"],
            "context",
        ),
        (["--device-memory", "64MiB", "--model", "nowhere"], "nowhere"),
    ],
)
def test_what_makes_no_sense_is_said(args, said, capsys):
    code, _, err = plan("--trace", str(TRACES / "ours.jsonl"), *args, capsys=capsys)
    assert code == 2
    assert said in err
    assert "Traceback" not in err


def test_a_machine_too_small_for_every_policy(capsys):
    code, _, err = plan(
        *("--trace", str(TRACES / "ours.jsonl"), "--device-memory", "8MiB", "--flops", "1e12"),
        *("--bandwidth", "1GB", "--policy", "static"),
        capsys=capsys,
    )
    assert code == 1
    assert "no policy can run on this machine; raise --device-memory" in err
