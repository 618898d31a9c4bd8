"""int8 K and V: attention within what quantisation allows, models as if K and V were rounded so,
and engines that keep their answers under pressure and hold nearly twice the tokens."""

import dataclasses
import json

import hf_checkpoints
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from engine_requests import greedy, random_requests
from flax import nnx

import ellm_jax.assembly
from ellm_jax import _native
from ellm_jax.assembly import TINY_MODEL
from ellm_jax.bench import quality
from ellm_jax.checkpoint import load_model
from ellm_jax.cli import main
from ellm_jax.models.xla_ops import XlaOps
from ellm_jax.runtime import ops
from ellm_jax.runtime.batch import Span, StepLayout, StepShape

ops.register()

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
TEXT = (
    "Once upon a time there was a little fox who lived near the river. One day the fox found a "
    "red ball under a tree. It was very happy and ran to show it to its friend, the rabbit. "
)


def softmax(scores):
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("q_heads", "kv_heads", "head_dim"), [(4, 2, 64), (3, 1, 80), (4, 4, 128)])
def test_attention_is_within_what_quantisation_allows(dtype, q_heads, kv_heads, head_dim):
    """Rounding moves an element of K or V by half its row's scale at most. So a score moves by
    e = scale |q|_1 k_scale / 2 at most, a weight by a factor of exp(2 e), and the result by
    (exp(2 e) - 1) sum p |v| + exp(2 e) sum p v_scale / 2; bfloat16 rounds weights and result on
    top."""
    seed, tokens, context = 5, 200, 130
    rng = np.random.default_rng(seed)
    layout = _native.KvLayout.choose(2, kv_heads, head_dim, 1, 4096, 2, scale_bytes=4)
    kv = _native.KvCache(_native.Pool(layout.chunk_bytes, 64 << 20), layout)
    q, k, v = (
        rng.standard_normal((tokens, heads, head_dim)).astype(DTYPES[dtype])
        for heads in (q_heads, kv_heads, kv_heads)
    )
    slot = kv.take_slot(1)
    call = jax.jit(lambda *a: ops.attention(*a, scale=head_dim**-0.5, soft_cap=0.0))
    epoch, outputs = jnp.zeros(1, jnp.int32), []
    for begin, end in ((0, context), (context, tokens)):
        kv.extend([slot], [end])
        meta = StepLayout(StepShape(end - begin, 2), 2).pack(
            kv.id, [Span(slot, begin, [0] * (end - begin), True)]
        )
        rows = [x[begin:end] for x in (q, k, v)]
        out, epoch = call(*rows, meta, np.int32(1), np.int32(0), epoch)
        outputs.append(np.asarray(out))
    got = np.concatenate(outputs).astype(np.float64)

    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    group = q_heads // kv_heads
    worst = 0.0
    for t in range(tokens):
        for h in range(q_heads):
            keys, values = k[: t + 1, h // group], v[: t + 1, h // group]
            p = softmax(keys @ q[t, h] * head_dim**-0.5)
            k_scale, v_scale = (np.abs(x).max(axis=1) / 127 for x in (keys, values))
            moved = head_dim**-0.5 * np.abs(q[t, h]).sum() * k_scale.max() / 2
            factor = np.exp(2 * moved)
            size = p @ np.abs(values)
            bound = (factor - 1) * size + factor * (p @ v_scale) / 2 + 1e-5
            if dtype == "bfloat16":
                bound = bound + 3 * (size + bound) / 256
            error = np.abs(got[t, h] - p @ values)
            assert (error <= bound).all(), f"seed {seed}, token {t}, head {h}"
            worst = max(worst, np.sqrt(np.mean(error**2)) / np.sqrt(np.mean(size**2)))
    assert worst < 0.05, "rounding errors do not add up like that"


class RoundedKv(XlaOps):
    """K and V are worth what int8 and a scale per row make of them."""

    def attend(self, q, k, v, layer, window, cache):
        def rounded(x):
            scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
            return jnp.rint(x / scale) * scale

        return super().attend(q, rounded(k), rounded(v), layer, window, cache)


def logprobs_of(path, tokens, model_ops):
    """Of each token but the first, float32."""
    model, _ = load_model(path, dtype="float32", progress=False)

    @nnx.jit
    def every(model, ids):
        hidden, _ = model(ids, jnp.arange(len(tokens)), model_ops, None)
        return jax.nn.log_softmax(model.logits(hidden, model_ops))

    found = np.asarray(every(model, jnp.asarray(tokens)))
    return found[np.arange(len(tokens) - 1), tokens[1:]]


@pytest.mark.parametrize("name", ["llama", "llama_mqa_head80", "qwen2_window", "qwen3_head128"])
def test_a_model_computes_as_if_its_k_and_v_were_rounded(name, tiny_checkpoint, make_engine):
    """Against the reference with K and V rounded, as near as float32 allows: a few values lie so
    near to the middle of two steps that they are rounded the other way. What rounding itself does
    is twenty times as much and more."""
    path = tiny_checkpoint(name)
    tokens = hf_checkpoints.prompts(name)[-1]
    engine = make_engine(path, dtype="float32", kv_dtype="int8", max_batch_tokens=32)
    reading = engine.generate([tokens], greedy(1, prompt_logprobs=1))[0].prompt_logprobs
    got = np.array([entry.logprob for entry in reading[1:]])
    rounded = logprobs_of(path, tokens, RoundedKv())
    plain = logprobs_of(path, tokens, XlaOps())
    effect = np.sqrt(np.mean((rounded - plain) ** 2))
    error = np.sqrt(np.mean((got - rounded) ** 2))
    print(name, effect, error)
    assert 1e-3 < effect < 0.2
    assert error < effect / 10


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama_bias_linear", "mistral_window"])
def test_greedy_tokens_are_the_same_alone_and_in_a_batch(name, dtype, tiny_checkpoint, make_engine):
    seed = 4
    requests = random_requests(seed, 12, prompt=(5, 90), output=(8, 40))
    engine = make_engine(tiny_checkpoint(name), dtype=dtype, kv_dtype="int8", max_batch_tokens=48)
    together = engine.generate([p for p, _ in requests], [greedy(n) for _, n in requests])
    for (prompt, count), output in zip(requests, together, strict=True):
        alone = engine.generate(prompt, greedy(count))[0]
        assert alone.token_ids == output.token_ids, f"seed {seed}"
    engine.sleep()
    engine.wake()
    prompt, count = requests[0]
    assert engine.generate(prompt, greedy(count))[0].token_ids == together[0].token_ids


@pytest.mark.parametrize("host_memory", ["0", "64MiB"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pressure_changes_no_token(host_memory, dtype, tiny_checkpoint, make_engine):
    """A limit that a third of the requests fill: they are moved to the host tier and back, where
    there is one, or computed again; what was shared or not, values and scales come back."""
    seed = 3
    path = tiny_checkpoint("llama", context=1024)
    requests = random_requests(seed, 24, prompt=(90, 130), output=(250, 350))
    prompts, params = [p for p, _ in requests], [greedy(n) for _, n in requests]
    plenty = make_engine(path, dtype=dtype, kv_dtype="int8", prefix_caching=False)
    expected = [plenty.generate(p, n)[0].token_ids for p, n in zip(prompts, params, strict=True)]
    layout = plenty._loop.ledger.kv.layout
    weights = plenty.memory().weights_bytes
    room = -(-24 * 400 // layout.tile_tokens) * layout.chunk_bytes // 3
    engine = make_engine(
        path,
        dtype=dtype,
        kv_dtype="int8",
        device_memory=weights + (4 << 20) + room,
        host_memory=host_memory,
        max_num_seqs=24,
        ttft_ms=1.0 if host_memory != "0" else None,
    )
    outputs = engine.generate(prompts, params)
    assert [o.token_ids for o in outputs] == expected, f"seed {seed}"
    moves = engine.stats().moves
    if host_memory == "0":
        assert sum(o.metrics.num_preemptions for o in outputs) > 0
    else:
        assert min(moves["offload"], moves["fetch"]) > 0


def test_shared_prefixes_hold_values_and_scales(tiny_checkpoint, make_engine):
    path = tiny_checkpoint("llama", context=1024)
    shared = make_engine(path, dtype="bfloat16", kv_dtype="int8")
    apart = make_engine(path, dtype="bfloat16", kv_dtype="int8", prefix_caching=False)
    tile = shared._loop.ledger.tile_tokens
    [(system, _)] = random_requests(5, 1, prompt=(3 * tile, 3 * tile), output=(1, 1))
    asked = [[*system, 7, 8, 9, number] for number in range(10)]
    answers = [engine.generate(asked, greedy(20)) for engine in (shared, apart)]
    assert [o.token_ids for o in answers[0]] == [o.token_ids for o in answers[1]]
    assert sorted(o.metrics.cached_tokens for o in answers[0]) == [0] + [3 * tile] * 9


@pytest.fixture
def thin_model(tmp_path):
    """Heads as of a Llama of 125 million parameters, and little else."""
    case = dataclasses.replace(
        hf_checkpoints.CASES["llama"],
        fields={"num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 128}
        | {"head_dim": 64, "num_hidden_layers": 12, "max_position_embeddings": 8192},
    )
    config = hf_checkpoints.config_dict(case, "bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_limit_holds_nearly_twice_the_tokens(thin_model, make_engine):
    most = {}
    for kv_dtype in ("auto", "int8"):
        engine = make_engine(
            thin_model, load_format="dummy", kv_dtype=kv_dtype, device_memory="32MiB"
        )
        layout = engine._loop.ledger.kv.layout
        assert layout.token_bytes == 12 * 2 * 4 * {"auto": 128, "int8": 68}[kv_dtype]
        most[kv_dtype] = engine._room_bytes() // layout.chunk_bytes * layout.tile_tokens
        prompt = [5] * (int(1.9 * most["auto"]) - 4)
        if kv_dtype == "auto":
            with pytest.raises(ValueError, match="it can never run"):
                engine.submit(prompt, greedy(4))
    print(most)
    assert most["int8"] >= 1.9 * most["auto"]
    assert len(engine.generate(prompt, greedy(4))[0].token_ids) == 4


def test_the_model_in_the_package_keeps_its_opinions(make_engine):
    """Log probabilities of a text against bfloat16 KV. Both engines take compiled steps from one
    cache."""
    readings = []
    for kv_dtype in ("auto", "int8"):
        engine = make_engine(TINY_MODEL, kv_dtype=kv_dtype)
        pieces = quality.windows(engine.tokenizer.encode(TEXT), 40)
        readings.append(quality.read(engine, pieces))
    found = quality.compare(*readings)
    print(found)
    assert 0 < found.mean_difference < 0.05
    assert found.largest_difference < 0.5
    assert found.same_likeliest > 0.95
    assert found.perplexity_after == pytest.approx(found.perplexity_before, rel=0.05)


def test_other_devices_refuse_it(tiny_checkpoint, make_engine, monkeypatch):
    cpu = ellm_jax.assembly.open_devices("cpu", 1)[0]
    cpu.platform = "cuda"
    monkeypatch.setattr(ellm_jax.assembly, "open_devices", lambda *_: [cpu])
    with pytest.raises(ValueError, match=r"kv_dtype='int8': the cuda backend.*device='cpu'"):
        make_engine(tiny_checkpoint("llama"), kv_dtype="int8")


def test_layouts_refuse_scales_of_what_is_not_int8():
    with pytest.raises(ValueError, match="scale_bytes is 4 with element_bytes of 2"):
        _native.KvLayout.choose(2, 2, 64, 2, 1024, 4, scale_bytes=4)


def test_the_command_measures_quality(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    line = ["bench", "quality", "--text", str(text), "--device-memory", "64MiB", "--quiet"]
    line += ["--no-warm-up", "--window", "40", "--kv-dtype", "int8"]
    assert main(line) == 0
    assert "perplexity, int8 KV" in capsys.readouterr().out
    assert main([*line[:-1], "int4"]) == 2
    assert "kv_dtype='int4': there are auto, int8" in capsys.readouterr().err
