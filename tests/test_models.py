"""Models against transformers, live where torch is installed and stored where it is not."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import hf_checkpoints as hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.typing import NDArray

from ellm_jax.checkpoint import load_model, read_config
from ellm_jax.models import ModelConfigError, config_from_hf, param_shapes
from ellm_jax.models.config import RopeConfig
from ellm_jax.models.decoder import Decoder, Wanted
from ellm_jax.models.rope import inverse_frequencies
from ellm_jax.models.xla_ops import XlaOps

LOGPROB_TOLERANCE = 1e-4
PARITY_TOKENS = 48


def every_logprob(model: Decoder, tokens: jax.Array) -> jax.Array:
    hidden, _ = model(tokens, jnp.arange(tokens.shape[0]), XlaOps(), None)
    return jax.nn.log_softmax(model.logits(hidden, XlaOps()))


jitted_logprobs = nnx.jit(every_logprob)


def logprobs_of(model: Decoder, ids: list[int]) -> NDArray[np.float32]:
    """`f32[T, V]`: log-probabilities after each token. Padded, so that a model compiles once."""
    padded = np.zeros(max(hf.PROMPT_TOKENS) + hf.NEW_TOKENS, np.int32)
    padded[: len(ids)] = ids
    return np.asarray(jitted_logprobs(model, jnp.asarray(padded)))[: len(ids)]


def raw_config(family: str, **changes: Any) -> dict[str, Any]:
    """A small config.json; a change to the value `...` removes the field."""
    case = hf.Case(family, hf._heads(4, 2, None, 256), hf._PLAIN, style=4)
    merged = {**hf.config_dict(case), **changes}
    return {field: value for field, value in merged.items() if value is not ...}


@pytest.mark.parametrize("name", hf.CASES)
def test_stored_expectations(name: str, tmp_path: Path) -> None:
    model, _ = load_model(hf.make_checkpoint(tmp_path, name))
    for expected in hf.expectations(name):
        ids = expected.prompt + expected.tokens[:-1]
        logprobs = logprobs_of(model, ids)[len(expected.prompt) - 1 :]
        what = f"{name}, seed {hf.CASES[name].seed}, prompt of {len(expected.prompt)}"
        assert logprobs.argmax(-1).tolist() == expected.tokens, what
        worst = np.abs(logprobs.max(-1) - np.array(expected.logprobs)).max()
        assert worst <= LOGPROB_TOLERANCE, f"{what}: logprobs differ by {worst}"


@pytest.mark.parametrize("name", hf.CASES)
def test_parity_with_transformers(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path = hf.make_checkpoint(tmp_path, name)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    ids = hf.prompts(name)[-1][:PARITY_TOKENS]
    with torch.no_grad():
        expected = torch.log_softmax(reference(torch.tensor([ids])).logits[0], -1).numpy()
    model, _ = load_model(path)
    worst = np.abs(logprobs_of(model, ids) - expected).max()
    assert worst <= LOGPROB_TOLERANCE, (
        f"{name}, seed {hf.CASES[name].seed}: logprobs differ by {worst}"
    )


@pytest.mark.parametrize("name", hf.CASES)
def test_config_styles_say_the_same(name: str) -> None:
    as_4, as_5 = (
        config_from_hf(hf.config_dict(dataclasses.replace(hf.CASES[name], style=style), "bfloat16"))
        for style in (4, 5)
    )
    assert as_4 == as_5
    assert hash(as_4) == hash(as_5)
    assert as_4.dtype == "bfloat16"


@pytest.mark.parametrize("name", hf.CASES)
def test_config_means_what_transformers_reads(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path = hf.make_checkpoint(tmp_path, name)
    read = transformers.AutoConfig.from_pretrained(path)
    read.save_pretrained(tmp_path / "saved")
    ours, again = read_config(path), read_config(tmp_path / "saved")
    # What transformers itself writes after reading our file is the same model.
    assert dataclasses.replace(again, dtype=ours.dtype) == ours


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llama", {"hidden_act": "gelu"}, ["hidden_act='gelu'", "'silu'"]),
        ("llama", {"quantization_config": {"bits": 4}}, ["quantization_config", "bits", "unset"]),
        ("llama", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5", "1"]),
        ("llama", {"attention_multiplier": 0.1}, ["attention_multiplier=0.1", "unset"]),
        ("qwen2", {"num_experts": 8}, ["num_experts=8"]),
        ("llama", {"rope_scaling": {"rope_type": "longrope"}}, ["rope_type='longrope'", "llama3"]),
        ("llama", {"rope_scaling": {"type": "su"}}, ["rope_type='su'", "yarn"]),
        ("qwen2", {"rope_scaling": {"mrope_section": [1, 2]}}, ["mrope_section=[1, 2]"]),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, ["no factor", "'linear'"]),
        ("llama", {"rope_scaling": "linear"}, ["rope_scaling='linear'", "object"]),
        ("llama", {"rope_theta": -1}, ["rope_theta=-1", "positive"]),
        ("llama", {"torch_dtype": "float8_e4m3fn"}, ["torch_dtype='float8_e4m3fn'", "bfloat16"]),
        ("llama", {"vocab_size": ...}, ["no vocab_size"]),
        ("llama", {"num_hidden_layers": 2.5}, ["num_hidden_layers=2.5"]),
        ("llama", {"num_attention_heads": 0}, ["num_attention_heads=0"]),
        ("llama", {"num_key_value_heads": 3}, ["num_key_value_heads=3", "multiple"]),
        ("llama", {"head_dim": 63}, ["head_dim=63", "even"]),
        ("llama", {"hidden_size": 250}, ["hidden_size=250", "head_dim"]),
        ("qwen2", {"max_window_layers": None}, ["max_window_layers=None"]),
        ("llama", {"eos_token_id": "end"}, ["eos_token_id='end'"]),
        ("llama", {"attention_bias": "yes"}, ["attention_bias='yes'"]),
        ("mistral", {"sliding_window": 0}, ["sliding_window=0", "positive"]),
        (
            "mistral",
            {"sliding_window": 8, "layer_types": ["full_attention"] * 3},
            ["layer_types", "sliding_attention in every layer"],
        ),
        ("qwen3", {"layer_types": ["linear_attention"] * 3}, ["'linear_attention'"]),
        ("qwen3", {"layer_types": ["full_attention"]}, ["layer_types", "3 layers"]),
        ("qwen3", {"layer_types": ["sliding_attention"] * 3}, ["use_sliding_window", "Set both"]),
        ("llama", {"model_type": "mixtral", "architectures": None}, ["'mixtral'", "qwen3"]),
        ("llama", {"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", "LlamaForCausalLM"]),
        ("llama", {"architectures": ["Qwen2ForCausalLM"]}, ["do not belong together"]),
        ("llama", {"model_type": None, "architectures": None}, ["model_type=None"]),
    ],
)
def test_unsupported_is_refused_by_name(
    family: str, changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ModelConfigError) as refusal:
        config_from_hf(raw_config(family, **changes))
    for word in words:
        assert word in str(refusal.value)


def test_head_dim_where_the_file_has_none() -> None:
    for family, absent in (("llama", 64), ("mistral", 64), ("qwen2", 64), ("qwen3", 128)):
        assert config_from_hf(raw_config(family, head_dim=...)).head_dim == absent
        assert config_from_hf(raw_config(family, head_dim=None)).head_dim == 64


@pytest.mark.parametrize(
    ("family", "changes", "windows"),
    [
        ("llama", {"sliding_window": 8}, (0, 0, 0)),
        ("mistral", {"sliding_window": 8}, (8, 8, 8)),
        ("mistral", {"sliding_window": None}, (0, 0, 0)),
        ("mistral", {}, (4096, 4096, 4096)),
        ("qwen2", {"sliding_window": 8}, (0, 0, 0)),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, (0, 0, 0)),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
            (0, 0, 8),
        ),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": 0,
                "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            },
            (0, 8, 0),
        ),
    ],
)
def test_sliding_windows(family: str, changes: dict[str, Any], windows: tuple[int, ...]) -> None:
    assert config_from_hf(raw_config(family, **changes)).sliding_window == windows


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        (None, 256),
        ({"rope_type": "linear", "factor": 4}, 1024),
        ({"type": "dynamic", "factor": 4}, 256),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
    ],
)
def test_longest_context(rope: dict[str, Any] | None, context: int) -> None:
    assert config_from_hf(raw_config("llama", rope_scaling=rope)).max_context == context


ROPES: list[dict[str, Any]] = [
    {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.5},
    {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {
        "rope_type": "yarn",
        "rope_theta": 1_000_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    },
    {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 0.8,
        "mscale_all_dim": 1.2,
        "truncate": False,
    },
    {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 4096,
        "attention_factor": 1.5,
    },
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: str(rope["rope_type"]))
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_stretched_frequencies(rope: dict[str, Any], head_dim: int) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    reference = transformers.LlamaConfig(
        head_dim=head_dim, rope_parameters=dict(rope), max_position_embeddings=131072
    )
    expected, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](reference, "cpu")
    raw = raw_config(
        "llama", head_dim=head_dim, rope_parameters=rope, max_position_embeddings=131072
    )
    ours = config_from_hf(raw).rope
    np.testing.assert_allclose(inverse_frequencies(ours, head_dim), expected.numpy(), rtol=2e-6)
    assert ours.attention_factor == pytest.approx(factor, rel=1e-12)


def test_llama3_frequencies_by_hand() -> None:
    # theta 4 and head size 8: frequencies 1, 1/sqrt 2, 1/2, 1/(2 sqrt 2). An original context of
    # 4 pi / sqrt 2 holds sqrt 2, 1, 1/sqrt 2 and 1/2 waves of them; the ramp goes from 1/2 to 1.
    rope = RopeConfig(
        theta=4.0,
        scaling="llama3",
        factor=10.0,
        low_freq_factor=0.5,
        high_freq_factor=1.0,
        original_context=0,
    )
    waves = np.sqrt([2.0, 1.0, 0.5, 0.25])
    rope = dataclasses.replace(rope, original_context=2 * np.pi * np.sqrt(2))
    kept = np.array([1.0, 1.0, (waves[2] - 0.5) / 0.5, 0.0])
    plain = np.sqrt([1.0, 0.5, 0.25, 0.125])
    np.testing.assert_allclose(
        inverse_frequencies(rope, 8), plain * (kept + (1 - kept) / 10), rtol=1e-6
    )


def test_window_mask_by_hand() -> None:
    # Equal scores, so that each query averages the values it sees; the values are 1, 2, 4, 8.
    values = jnp.asarray([1.0, 2.0, 4.0, 8.0]).reshape(4, 1, 1)
    zeros = jnp.zeros((4, 2, 1))
    layer = jnp.int32(0)
    full, _ = XlaOps().attend(zeros, zeros[:, :1], values, layer, jnp.int32(0), None)
    two, _ = XlaOps().attend(zeros, zeros[:, :1], values, layer, jnp.int32(2), None)
    np.testing.assert_allclose(full[:, 1, 0], [1, 1.5, 7 / 3, 15 / 4], rtol=1e-6)
    np.testing.assert_allclose(two[:, 1, 0], [1, 1.5, 3, 6], rtol=1e-6)


def test_query_heads_read_their_own_key_value_head() -> None:
    values = jnp.asarray([[[10.0], [20.0]]])  # one token, two key-value heads
    zeros = jnp.zeros((1, 4, 1))
    mixed, _ = XlaOps().attend(zeros, zeros[:, :2], values, jnp.int32(0), jnp.int32(0), None)
    assert mixed[0, :, 0].tolist() == [10, 10, 20, 20]


class RecordingOps(XlaOps):
    """Notes the shapes the model hands over while it is traced."""

    def __init__(self) -> None:
        self.weights: list[tuple[int, ...]] = []
        self.rows: list[int] = []
        self.attended: list[tuple[tuple[int, ...], ...]] = []

    def linear(self, x: jax.Array, weight: jax.Array, layer: jax.Array, *out: Any) -> jax.Array:
        self.weights.append(weight.shape)
        self.rows.append(x.shape[0])
        assert layer.dtype == jnp.int32
        return super().linear(x, weight, layer, *out)

    def attend(self, q: Any, k: Any, v: Any, layer: Any, window: Any, cache: Any) -> Any:
        self.attended.append((q.shape, k.shape, v.shape, window.shape))
        return super().attend(q, k, v, layer, window, cache + 1)


def test_ops_get_whole_weights_once_and_the_cache_is_threaded() -> None:
    config = config_from_hf(raw_config("qwen3", head_dim=32))
    model = Decoder(config, rngs=nnx.Rngs(0))
    ops = RecordingOps()
    hidden, cache = jax.jit(lambda t: model(t, jnp.arange(5), ops, jnp.int32(0)))(jnp.arange(5))
    assert hidden.shape == (5, 256)
    assert ops.weights == [
        param_shapes(config)[f"blocks.{name}"] for name in ("qkv", "o", "gate_up", "down")
    ], "each matrix is handed over stacked, and traced once for all layers"
    assert ops.attended == [((5, 4, 32), (5, 2, 32), (5, 2, 32), ())]
    assert cache == config.num_layers


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_wanted_rows_are_those_of_all(family: str, layers: int) -> None:
    config = config_from_hf(raw_config(family, head_dim=32, num_hidden_layers=layers))
    model = Decoder(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(layers)
    tokens = jnp.asarray(rng.integers(0, config.vocab_size, 20), jnp.int32)
    rows = jnp.asarray([19, 3, 3], jnp.int32)
    whole, few = RecordingOps(), RecordingOps()

    @jax.jit
    def both(tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        positions, cache = jnp.arange(20), jnp.int32(0)
        every, _ = model(tokens, positions, whole, cache)
        some, cache = model(tokens, positions, few, cache, Wanted(rows, few))
        return every[rows], some, cache

    every, some, cache = both(tokens)
    assert np.abs(np.asarray(every) - np.asarray(some)).max() < 1e-5
    assert cache == layers, "a layer's keys and values are missing"
    assert few.rows[-3:] == [3, 3, 3], "the last layer computes rows that nobody wants"


def test_few_leaves_and_a_static_graph() -> None:
    config = config_from_hf(raw_config("qwen2"))
    graph, state = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))
    assert len(jax.tree.leaves(state)) == len(param_shapes(config)) == 10
    again, _ = nnx.split(Decoder(config, rngs=nnx.Rngs(1)))
    assert graph == again
    assert hash(graph) == hash(again)


def test_named_params_round_trip() -> None:
    config = config_from_hf(raw_config("qwen3", head_dim=32, attention_bias=True))
    model = Decoder(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(3))
    params = model.named_params()
    assert {name: array.shape for name, array in params.items()} == param_shapes(config)
    again = Decoder.from_params(config, params).named_params()
    assert all(again[name] is array for name, array in params.items())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_bfloat16_follows_float32(family: str) -> None:
    config = config_from_hf(raw_config(family, head_dim=32))
    wide = Decoder(config, rngs=nnx.Rngs(0))
    narrow = Decoder.from_params(
        config, {name: array.astype(jnp.bfloat16) for name, array in wide.named_params().items()}
    )
    ids = list(range(20))
    hidden, _ = narrow(jnp.asarray(ids), jnp.arange(20), XlaOps(), None)
    assert hidden.dtype == jnp.bfloat16
    assert np.abs(logprobs_of(narrow, ids) - logprobs_of(wide, ids)).max() < 0.05


def test_every_parameter_learns() -> None:
    config = config_from_hf(raw_config("qwen3", head_dim=32, attention_bias=True))
    tokens = jnp.arange(12)

    def loss(model: Decoder) -> jax.Array:
        hidden, _ = model(tokens, jnp.arange(12), XlaOps(), None)
        logprobs = jax.nn.log_softmax(model.logits(hidden, XlaOps()))
        return -jnp.take_along_axis(logprobs[:-1], tokens[1:, None], axis=1).mean()

    grads = nnx.grad(loss)(Decoder(config, rngs=nnx.Rngs(0)))
    for path, grad in nnx.to_flat_state(grads):
        values = np.asarray(grad[...])
        assert np.isfinite(values).all(), path
        assert np.abs(values).max() > 0, path


def test_reading_a_configuration_does_not_import_jax() -> None:
    code = "import sys, ellm_jax.models; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
