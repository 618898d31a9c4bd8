"""An engine on two devices against the same engine on one. Needs a JAX with two of them:
test_tensor_parallel.py runs this in a process of its own, and so can anybody:

    XLA_FLAGS=--xla_force_host_platform_device_count=2 pytest tests/two_devices.py
"""

import functools
import json
import logging

import hf_checkpoints
import jax
import numpy as np
import pytest
from engine_requests import check_that_failed_steps_are_run_again, greedy, random_requests
from test_backend import AsOnAGpu

import ellm_jax.devices.group
from ellm_jax import Engine, EngineConfig, SamplingParams
from ellm_jax.devices import DeviceError
from ellm_jax.models.shards import Shards

OWNERS = ("free", "kv", "cache", "activation", "weights", "workspace")


def test_there_are_two_devices():
    assert len(jax.devices("cpu")) == 2


@pytest.fixture
def make_pair(make_engine):
    """Engines on two devices that look at both after every step."""
    made = []

    def make(path, **config):
        engine = make_engine(path, tensor_parallel=2, **config)
        loop = engine._loop
        step = loop.step

        def checked_step():
            goes_on = step()
            check_members(engine)
            return goes_on

        loop.step = checked_step
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close()
        check_members(engine)
        for pool in engine._loop.ledger._pool.members:
            usage = pool.usage()
            assert usage["kv"] == usage["cache"] == usage["activation"] == 0, usage


def check_members(engine):
    """Both devices add up, and hold the same."""
    ledger = engine._loop.ledger
    pictures = [pool.usage() for pool in ledger._pool.members]
    for usage in pictures:
        assert sum(usage[owner] for owner in OWNERS) == usage["limit"], usage
        assert usage["physical"] <= usage["limit"], usage
    for name in ("limit", "kv", "cache", "weights", "workspace"):
        assert len({usage[name] for usage in pictures}) == 1, (name, pictures)
    for request in engine._loop.scheduler.running:
        mapped = {kv.mapped_tokens(request.slot) for kv in ledger.kv.members}
        assert len(mapped) == 1 or request.slot in ledger._premapped, mapped


def answers(outputs):
    return [
        (output.token_ids, output.outputs[0].logprobs, output.prompt_logprobs) for output in outputs
    ]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", "float32"),
        ("llama", "bfloat16"),
        ("llama31_tied", "float32"),
        ("llama_bias_linear", "float32"),
        ("llama_bias_linear", "bfloat16"),
        ("mistral_window", "float32"),
        ("qwen2_tied", "float32"),
        ("qwen2_tied", "bfloat16"),
        ("qwen3_head128", "float32"),
    ],
)
def test_two_devices_answer_as_one(name, dtype, tiny_checkpoint, make_engine, make_pair):
    """The same tokens and the same log probabilities, bit for bit: grouped heads, biases, tied
    embeddings, normalised queries and keys, windows."""
    path = tiny_checkpoint(name)
    expected = hf_checkpoints.expectations(name)
    prompts = [e.prompt for e in expected]
    more = {"prompt_logprobs": 2} if name == "llama" else {}  # a step of its own to compile
    params = greedy(hf_checkpoints.NEW_TOKENS, logprobs=3, **more)
    limits = {"dtype": dtype, "max_batch_tokens": 32, "max_num_seqs": 4}
    one = make_engine(path, **limits).generate(prompts, params)
    two = make_pair(path, **limits).generate(prompts, params)
    assert answers(two) == answers(one)
    if dtype == "float32":
        assert [list(output.token_ids) for output in two] == [e.tokens for e in expected]


def test_a_vocabulary_that_does_not_divide(tmp_path, make_engine, make_pair):
    """501 tokens: the second device has a row that is nobody's, which is never chosen."""
    case = hf_checkpoints.CASES["llama"]
    config = {**hf_checkpoints.config_dict(case), "vocab_size": 501}
    weights = hf_checkpoints.make_weights(config, seed=4)
    # Every score is below that of the row of zeros that is not there.
    weights["model.norm.weight"] = np.abs(weights["model.norm.weight"])
    path = hf_checkpoints.write_checkpoint(tmp_path / "odd", config, weights)
    prompts = [[3, 499, 500], [7] * 40]
    params = greedy(20, logprobs=5)
    one = make_engine(path).generate(prompts, params)
    two = make_pair(path).generate(prompts, params)
    assert answers(two) == answers(one)


def test_sampling_is_that_of_one_device(tiny_checkpoint, make_engine, make_pair):
    path = tiny_checkpoint("llama", context=1024)
    requests = random_requests(6, 6, prompt=(5, 60), output=(40, 80))
    params = [
        SamplingParams(
            temperature=0.8, top_k=40, top_p=0.95, seed=i, max_tokens=n, ignore_eos=True,
            frequency_penalty=0.3, repetition_penalty=1.1, logprobs=2,
        )
        for i, (_, n) in enumerate(requests)
    ]  # fmt: skip
    prompts = [p for p, _ in requests]
    one = make_engine(path).generate(prompts, params)
    two = make_pair(path).generate(prompts, params)
    assert answers(two) == answers(one)


def test_steps_are_checked_on_both_devices_as_on_gpus(
    tiny_checkpoint, make_engine, make_pair, monkeypatch
):
    """On a GPU the host checks what a step touches, on every device, and chooses between two
    programs. A step that is refused is planned again."""
    path = tiny_checkpoint("llama")
    prompts = [[3, 4, 5], [7] * 40]
    params = [greedy(12), SamplingParams(temperature=0.9, seed=3, max_tokens=12, ignore_eos=True)]
    one = make_engine(path).generate(prompts, params)
    gpu = AsOnAGpu(monkeypatch)
    engine = make_pair(path)
    gpu.refused = 1
    assert answers(engine.generate(prompts, params)) == answers(one)
    assert gpu.checked > 12
    assert gpu.refused == 0


@pytest.mark.parametrize("host_memory", ["0", "16MiB"])
def test_pressure_changes_no_token(host_memory, tiny_checkpoint, make_engine, make_pair):
    """Each device is too small for all requests: they are computed again, or rest in host memory,
    and share prefixes."""
    path = tiny_checkpoint("llama", context=1024)
    requests = random_requests(5, 12, prompt=(20, 40), output=(250, 350))
    shared = list(range(3, 103))
    prompts = [shared + p if i % 3 else p for i, (p, _) in enumerate(requests)]
    params = [greedy(n) for _, n in requests]
    large = make_engine(path, device_memory="256MiB", max_num_seqs=12)
    expected = [output.token_ids for output in large.generate(prompts, params)]
    small = make_pair(
        path, device_memory="6MiB", host_memory=host_memory, max_num_seqs=12, ttft_ms=1.0
    )
    assert [output.token_ids for output in small.generate(prompts, params)] == expected
    stats = small.stats()
    assert stats.cached_tokens > 0
    if host_memory == "0":
        assert stats.preemptions > 0
    else:
        assert stats.moves["offload"] > 0
        assert stats.moves["fetch"] > 0
    # Again, with the prefixes that are left.
    assert [output.token_ids for output in small.generate(prompts, params)] == expected


def test_limits_change_and_the_engine_sleeps_while_it_serves(
    tiny_checkpoint, make_engine, make_pair
):
    path = tiny_checkpoint("llama", context=1024)
    requests = random_requests(7, 8, prompt=(20, 60), output=(200, 250))
    prompts, params = [p for p, _ in requests], [greedy(n) for _, n in requests]
    expected = [o.token_ids for o in make_engine(path).generate(prompts, params)]
    engine = make_pair(path, device_memory="16MiB", host_memory="8MiB")
    futures = [engine.submit(p, q) for p, q in zip(prompts, params, strict=True)]
    engine.resize(device_memory="6MiB")
    assert engine.memory().limit_bytes == 6 << 20
    engine.resize(host_memory="1MiB")
    engine.sleep()
    asleep = engine.memory()
    assert asleep.weights_bytes == asleep.kv_bytes == asleep.cache_bytes == 0
    engine.wake()
    engine.resize(device_memory="12MiB", host_memory="4MiB")
    assert [future.result(300).token_ids for future in futures] == expected
    with pytest.raises(ValueError, match="weights, the engine's own arrays"):
        engine.resize(device_memory="1MiB")
    usage = [pool.usage()["limit"] for pool in engine._loop.ledger._pool.members]
    assert usage == [12 << 20] * 2


class Failing:
    """A device's KV cache, with some calls that fail before they do anything."""

    def __init__(self, kv, call, every):
        self._kv, self._call, self._every = kv, call, every
        self.calls = self.failures = 0

    def __getattr__(self, name):
        if name != self._call:
            return getattr(self._kv, name)

        def fail(*args):
            self.calls += 1
            if self.calls % self._every == 0:
                self.failures += 1
                raise RuntimeError(f"injected: {name}")
            return getattr(self._kv, name)(*args)

        return fail


@pytest.mark.parametrize("call", ["extend", "take", "map_shared", "truncate"])
def test_a_driver_that_fails_on_the_second_device_only_costs_no_answer(
    call, tiny_checkpoint, make_engine, make_pair
):
    path = tiny_checkpoint("llama", context=1024)
    requests = random_requests(8, 10, prompt=(30, 120), output=(30, 80))
    shared = list(range(3, 103))
    prompts = [shared + p for p, _ in requests]
    params = [greedy(n) for _, n in requests]
    expected = [o.token_ids for o in make_engine(path).generate(prompts, params)]
    engine = make_pair(path, max_num_seqs=3, idle_trim_s=None)
    kv = engine._loop.ledger.kv
    sound = kv.members
    failing = Failing(sound[1], call, every=3)
    logging.disable(logging.WARNING)
    try:
        kv.members = (sound[0], failing)
        outputs = engine.generate(prompts, params)
    finally:
        logging.disable(logging.NOTSET)
    assert failing.failures > 0, "nothing failed"
    assert [output.token_ids for output in outputs] == expected
    kv.members = sound
    assert [o.token_ids for o in engine.generate(prompts, params)] == expected


def test_steps_that_fail_are_run_again(tiny_checkpoint, make_pair, monkeypatch):
    """It fails on both devices, at the same place."""
    engine = make_pair(tiny_checkpoint("llama", context=1024))
    check_that_failed_steps_are_run_again(engine, monkeypatch)


def test_running_a_compiled_step_compiles_nothing(tiny_checkpoint, make_pair):
    engine = make_pair(tiny_checkpoint("llama"), warm_up=True)
    engine.warm_up()
    engine.generate([5, 6, 7], greedy(5))
    compiled = []

    def listen(event: str, duration_s: float, **_: object) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        engine.generate([[i + 3] * (1 + 9 * i) for i in range(12)], greedy(10))
        assert not compiled
    finally:
        jax.monitoring.clear_event_listeners()


@pytest.mark.parametrize("name", ["llama_bias_linear", "qwen3_head128"])
def test_sums_over_divided_inputs(name, tiny_checkpoint, make_pair, monkeypatch):
    """The division for GPUs, with one exchange per matrix: the tokens of transformers, and its log
    probabilities within what another order of additions does."""
    monkeypatch.setattr(
        ellm_jax.devices.group, "Shards", lambda count, exact: Shards(count, exact=False)
    )
    expected = hf_checkpoints.expectations(name)
    engine = make_pair(tiny_checkpoint(name), max_batch_tokens=32, max_num_seqs=4)
    outputs = engine.generate(
        [e.prompt for e in expected], greedy(hf_checkpoints.NEW_TOKENS, logprobs=0)
    )
    for output, e in zip(outputs, expected, strict=True):
        assert list(output.token_ids) == e.tokens
        entries = output.outputs[0].logprobs
        assert [entry.logprob for entry in entries] == pytest.approx(e.logprobs, abs=1e-4)


@pytest.mark.parametrize("held", [{"quantization": "int8"}, {"kv_dtype": "int8"}])
@pytest.mark.parametrize("name", ["llama_bias_linear", "qwen2_tied"])
def test_int8_answers_as_on_one_device(name, held, tiny_checkpoint, make_engine, make_pair):
    path = tiny_checkpoint(name)
    prompts = [list(range(5, 5 + n)) for n in (3, 20, 70)]
    params = greedy(12, logprobs=0)
    answers = []
    for make in (make_engine, make_pair):
        engine = make(path, dtype="bfloat16", max_batch_tokens=32, **held)
        outputs = engine.generate(prompts, params)
        logprobs = [[entry.logprob for entry in o.outputs[0].logprobs] for o in outputs]
        answers.append(([list(o.token_ids) for o in outputs], logprobs))
    assert answers[0] == answers[1]


def test_each_device_holds_its_part_and_no_more(tiny_checkpoint, make_engine, make_pair):
    path = tiny_checkpoint("llama")
    one, two = make_engine(path), make_pair(path)
    weights = two._loop.executor._runner._weights
    held = [0, 0]
    for array in jax.tree.leaves(weights):
        for shard in array.addressable_shards:
            held[shard.device.id] += shard.data.nbytes
    assert held[0] == held[1] == two.memory().weights_bytes
    whole = one.memory().weights_bytes
    norms = 4 * (2 * 3 + 1) * one.model_config.hidden_size
    assert held[0] - norms == (whole - norms) / 2
    layout = two._loop.ledger.kv.layout
    assert layout.kv_heads == 1
    assert layout.token_bytes == one._loop.ledger.kv.layout.token_bytes / 2


def test_models_that_cannot_be_divided_and_devices_that_are_not_there(tiny_checkpoint, tmp_path):
    config = functools.partial(EngineConfig, progress=False, device_memory="64MiB")
    refusal = r"tensor_parallel=2: the model has 1 key-value heads.*choose 1$"
    with pytest.raises(ValueError, match=refusal):
        Engine.from_pretrained(tiny_checkpoint("qwen2_window"), config(tensor_parallel=2))
    with pytest.raises(DeviceError, match="4 devices were asked for, and JAX makes 2 of the CPU"):
        Engine.from_pretrained(tiny_checkpoint("llama"), config(tensor_parallel=4))
    uneven = json.loads((tiny_checkpoint("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**uneven, "intermediate_size": 225}))
    with pytest.raises(ValueError, match="an intermediate size of 225, which 2 devices cannot"):
        Engine.from_pretrained(tmp_path, config(tensor_parallel=2))
