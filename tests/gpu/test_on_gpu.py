"""Memory, steps and the host tier of an engine on a GPU."""

import json
import random

import hf_checkpoints as hf
import pytest

from ellm_jax import SamplingParams
from ellm_jax.devices.allocator import check_allocator
from ellm_jax.doctor import examine
from ellm_jax.memory.balloon import DeviceBalloon
from ellm_jax.runtime.batch import Span
from ellm_jax.runtime.failures import StepFailed
from ellm_jax.runtime.shapes import StepKey, StepMode, StepShape

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

MIB = 1 << 20
ROUNDING = 64 * MIB


@pytest.fixture
def model(tmp_path):
    """32 KiB of KV per token: a chunk of 2 MiB holds 64 of them."""
    config = hf.config_dict(hf.CASES["llama"], "float32")
    config |= {"num_hidden_layers": 4, "num_key_value_heads": 8, "num_attention_heads": 8}
    config |= {"head_dim": 128, "max_position_embeddings": 2048, "intermediate_size": 2048}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def params(tokens: int, **more: object) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, **more)


def prompts(count: int, length: int, seed: int = 1) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, hf.VOCAB) for _ in range(length)] for _ in range(count)]


def open_engine(make_engine, model, device: str, **config: object):
    defaults = {"load_format": "dummy", "device": device, "device_memory": "256MiB"}
    return make_engine(model, **{**defaults, "max_batch_tokens": 512, **config})


def balloon_of(engine) -> DeviceBalloon:
    balloon = engine._loop.ledger._balloon
    if not isinstance(balloon, DeviceBalloon):
        pytest.skip("the CPU has no memory pool")
    return balloon


def test_xla_allocates_from_the_pool_that_the_engine_steers(make_engine, model, device):
    engine = open_engine(make_engine, model, device)
    balloon = balloon_of(engine)
    weights = engine.memory().by_owner()["weights"]
    assert balloon.pool.usage().used >= weights
    device_of_jax = engine._loop.executor._runner._carry.epoch.devices().pop()
    check_allocator(balloon.pool, device_of_jax)


def test_memory_moves_to_kv_and_back_and_keeps_to_the_limit(make_engine, model, device):
    engine = open_engine(make_engine, model, device, max_num_seqs=16, prefix_caching=False)
    # Steps with large needs, then KV that takes all there is, then large steps again.
    for _ in range(2):
        engine.generate(prompts(4, 1500), params(2))
        engine.generate(prompts(16, 64, seed=2), params(400))
    counts = {kind for kind, count in engine.stats().moves.items() if count}
    assert "inflate" in counts, counts
    report = engine.memory()
    assert sum(report.by_owner().values()) == report.limit_bytes
    balloon = balloon_of(engine)
    usage, owned = balloon.pool.usage(), report.by_owner()
    not_chunks = owned["weights"] + owned["workspace"] + owned["activation"]
    assert usage.used <= not_chunks
    # Free chunks that are made already count: they are taken from the device too.
    chunks = engine._loop.ledger.usage()["physical"] - not_chunks
    assert chunks >= owned["kv"] + owned["cache"]
    assert usage.reserved + chunks <= report.limit_bytes, "more is taken than the limit"


def test_what_nobody_uses_goes_back(make_engine, model, device):
    engine = open_engine(make_engine, model, device)
    engine.generate(prompts(4, 1500), params(2))
    engine.trim()
    balloon = balloon_of(engine)
    usage = balloon.pool.usage()
    assert usage.reserved - usage.used <= ROUNDING
    weights = engine.memory().by_owner()["weights"]
    assert weights > MIB
    engine.sleep()
    assert balloon.pool.usage().used <= usage.used - weights
    engine.wake()
    assert engine.generate(prompts(1, 20), params(4))[0].outputs[0].error is None


def test_the_limit_changes_while_requests_run(make_engine, model, device):
    engine = open_engine(make_engine, model, device, max_num_seqs=8)
    alone = [engine.generate([p], params(120))[0].token_ids for p in prompts(8, 200)]
    futures = [engine.submit(p, params(120)) for p in prompts(8, 200)]
    engine.resize(device_memory="144MiB")
    engine.resize(device_memory="256MiB")
    assert [f.result().token_ids for f in futures] == alone


def test_requests_rest_in_host_memory_and_come_back_unchanged(make_engine, model, device):
    settings = {"max_num_seqs": 8, "policy": "elastic", "prefix_caching": False}
    free = open_engine(make_engine, model, device, **settings)
    expected = [o.token_ids for o in free.generate(prompts(12, 500), params(60))]
    engine = open_engine(
        make_engine,
        model,
        device,
        device_memory="176MiB",
        host_memory="256MiB",
        ttft_ms=50.0,
        tpot_ms=1000.0,
        **settings,
    )
    outputs = engine.generate(prompts(12, 500), params(60))
    assert [o.token_ids for o in outputs] == expected
    moves = engine.stats().moves
    assert moves.get("offload", 0) > 0, moves
    assert moves.get("fetch", 0) > 0, moves


def test_a_step_that_touches_unmapped_memory_is_refused_and_the_next_one_works(
    make_engine, model, device
):
    engine = open_engine(make_engine, model, device)
    runner = engine._loop.executor._runner
    key = StepKey(StepShape(1, 1), StepMode())

    def dispatch() -> None:
        runner.compile(key)
        step = runner.dispatch(key, [Span(0, 1000, [5], True)], None, None)
        runner.wait(step)

    with pytest.raises(StepFailed, match="mapped"):
        engine._thread.call(dispatch)
    assert len(engine.generate(prompts(1, 20), params(4))[0].token_ids) == 4


def test_what_requests_ask_for_is_computed_beside_greedy_ones(make_engine, model, device):
    engine = open_engine(make_engine, model, device)
    every = prompts(4, 30)
    alone = engine.generate(every[0], params(20))[0].token_ids
    asked = [
        params(20),
        SamplingParams(temperature=0.8, top_p=0.9, top_k=20, seed=4, max_tokens=20),
        params(20, frequency_penalty=0.5),
        params(20, logprobs=2),
    ]
    outputs = engine.generate([every[0], *every[1:]], asked)
    assert outputs[0].token_ids == alone
    again = engine.generate(every[1], asked[1])[0].token_ids
    assert len(again) > 0
    assert len(outputs[3].outputs[0].logprobs) == 20


def test_the_doctor_finds_everything_well(device):
    findings = list(examine())
    assert all(finding.level != "error" for finding in findings), findings
    names = {finding.name: finding for finding in findings}
    if device == "cuda":
        assert names["engines run on"].value == "cuda"
        assert names["gpu memory"].level == "ok"
