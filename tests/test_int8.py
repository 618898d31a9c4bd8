"""int8 weights: the kernel against integer arithmetic, loading, and engines that run with them."""

import json
from dataclasses import replace

import hf_checkpoints
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from engine_requests import greedy, random_requests

import ellm_jax.assembly
from ellm_jax import _native
from ellm_jax.assembly import TINY_MODEL
from ellm_jax.bench import quality
from ellm_jax.checkpoint import convert, load_model, read_config, weights_bytes
from ellm_jax.cli import main
from ellm_jax.models import held_params, scale_of
from ellm_jax.models.shards import Shards
from ellm_jax.models.xla_ops import XlaOps
from ellm_jax.runtime import ops

ops.register()

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
TEXT = (
    "Once upon a time there was a little fox who lived near the river. One day the fox found a "
    "red ball under a tree. It was very happy and ran to show it to its friend, the rabbit. "
)


def by_hand(x):
    """Values and scales of the rows of a matrix, as the definition says."""
    wide = np.asarray(x, np.float32)
    scale = np.abs(wide).max(axis=-1) / np.float32(127)
    return np.rint(wide / np.where(scale == 0, 1, scale)[..., None]).astype(np.int8), scale


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("k", [1, 7, 64, 1000])
def test_rows_are_quantised_as_defined(dtype, k):
    rng = np.random.default_rng(k)
    x = (rng.standard_normal((9, k)) * 10.0 ** rng.integers(-9, 9, (9, 1))).astype(DTYPES[dtype])
    x[4] = 0
    values, scales = np.full((9, k), 99, np.int8), np.full(9, 99, np.float32)
    _native.quantize_int8(x if dtype == "float32" else x.view(np.uint16), values, scales)
    expected, expected_scales = by_hand(x)
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(scales, expected_scales)
    assert np.abs(values).max(axis=1).tolist() == [127] * 4 + [0] + [127] * 4


def test_quantising_refuses_arrays_that_do_not_fit():
    x = np.ones((4, 8), np.float32)
    with pytest.raises(ValueError, match="do not fit"):
        _native.quantize_int8(x, np.empty((4, 7), np.int8), np.empty(4, np.float32))
    with pytest.raises(TypeError):
        _native.quantize_int8(x.astype(np.float64), np.empty((4, 8), np.int8), np.empty(4, "f4"))
    with pytest.raises(TypeError):
        _native.quantize_int8(x.T, np.empty((8, 4), np.int8), np.empty(8, np.float32))


@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("out_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 7, 33), (3, 200, 64), (9, 130, 80), (70, 96, 48)])
def test_linear(x_dtype, out_dtype, rows, n, k):
    """Equal to the bit to int64 sums that are scaled in float32."""
    rng = np.random.default_rng(rows * n + k)
    x = rng.standard_normal((rows + 2, k)).astype(DTYPES[x_dtype])
    w = rng.integers(-127, 128, (3, n, k), np.int8)
    scale = rng.uniform(0.001, 0.1, (3, n)).astype(np.float32)
    used = np.array([rows], np.int32)
    out = np.asarray(
        jax.jit(lambda *a: ops.linear_int8(*a, out_dtype))(x, w, scale, np.int32(2), used)
    )
    values, x_scale = by_hand(x[:rows])
    sums = values.astype(np.int64) @ w[2].astype(np.int64).T
    expected = (sums.astype(np.float32) * x_scale[:, None] * scale[2]).astype(DTYPES[out_dtype])
    np.testing.assert_array_equal(out[:rows], expected)
    assert not out[rows:].astype(np.float32).any()
    # XLA divides by a constant by multiplying, so that some ties are rounded the other way.
    plain = XlaOps().linear_int8(jnp.asarray(x[:rows]), w, scale, jnp.int32(2), out_dtype)
    difference = np.asarray(plain, np.float32) - expected.astype(np.float32)
    assert np.linalg.norm(difference) < 0.01 * np.linalg.norm(expected.astype(np.float32))


def test_linear_is_close_to_the_product_of_what_was_quantised():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((5, 512)).astype(np.float32)
    w = rng.standard_normal((64, 512)).astype(np.float32)
    values, scale = by_hand(w)
    used = np.array([5], np.int32)
    out = ops.linear_int8(x, values[None], scale[None], jnp.int32(0), used, "float32")
    exact = x.astype(np.float64) @ w.astype(np.float64).T
    assert np.linalg.norm(np.asarray(out) - exact) / np.linalg.norm(exact) < 0.015


def test_linear_refuses_rows_too_long_for_its_sums():
    x, w = np.ones((1, 65537), np.float32), np.ones((1, 2, 65537), np.int8)
    one = np.array([1], np.int32)
    with pytest.raises(jax.errors.JaxRuntimeError, match="at most 65536"):
        jax.block_until_ready(
            ops.linear_int8(x, w, np.ones((1, 2), np.float32), jnp.int32(0), one, "float32")
        )


@pytest.mark.parametrize("name", ["llama_bias_linear", "qwen2_tied", "qwen3_head128"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("orbax", [False, True])
def test_matrices_are_loaded_as_int8_and_nothing_else_is(
    name, dtype, orbax, tiny_checkpoint, tmp_path
):
    path = tiny_checkpoint(name)
    if orbax:
        path = convert(path, tmp_path / "converted", dtype=dtype, progress=False)
    before = load_model(path, dtype=dtype)[0].named_params()
    told = []
    model, config = load_model(
        path,
        dtype=dtype,
        quantization="int8",
        progress=lambda done, total: told.append((done, total)),
    )
    after = model.named_params()
    held = held_params(config, "int8")
    assert {name: array.shape for name, array in after.items()} == {
        name: param.shape for name, param in held.items()
    }
    before.setdefault("lm_head", before["embed"])
    matrices = {"blocks.qkv", "blocks.o", "blocks.gate_up", "blocks.down", "lm_head"}
    for param, array in before.items():
        if param in matrices:
            values, scales = by_hand(array)
            np.testing.assert_array_equal(after[param], values)
            np.testing.assert_array_equal(after[scale_of(param)], scales)
        else:
            np.testing.assert_array_equal(after[param], array)
    bytes_held = sum(array.nbytes for array in after.values())
    assert bytes_held == weights_bytes(config, dtype, quantization="int8")
    assert told[-1] == (weights_bytes(config, dtype),) * 2


def test_parts_of_devices_are_those_of_the_whole(tiny_checkpoint):
    config = read_config(tiny_checkpoint("qwen2_tied"))
    two = Shards(2)
    for name, held in held_params(config, "int8").items():
        part = two.part_shape(name, held.shape)
        if name.endswith("_scale"):
            matrix = name.removesuffix("_scale")
            whole = held_params(config, "int8")[matrix].shape
            assert part == two.part_shape(matrix, whole)[:-1], name
            assert part[-1] == -(-held.shape[-1] // 2)
    whole, each = (
        weights_bytes(config, None, quantization="int8"),
        weights_bytes(config, None, two, "int8"),
    )
    assert whole / 2 < each < whole * 0.55


@pytest.mark.parametrize("name", ["llama_bias_linear", "qwen2_tied"])
def test_greedy_tokens_are_the_same_alone_and_in_a_batch(name, tiny_checkpoint, make_engine):
    seed = 4
    requests = random_requests(seed, 12, prompt=(5, 90), output=(8, 40))
    engine = make_engine(
        tiny_checkpoint(name), dtype="bfloat16", quantization="int8", max_batch_tokens=48
    )
    together = engine.generate([p for p, _ in requests], [greedy(n) for _, n in requests])
    for (prompt, count), output in zip(requests, together, strict=True):
        alone = engine.generate(prompt, greedy(count))[0]
        assert alone.token_ids == output.token_ids, f"seed {seed}"
    engine.sleep()
    assert engine.memory().weights_bytes == 0
    engine.wake()
    prompt, count = requests[0]
    assert engine.generate(prompt, greedy(count))[0].token_ids == together[0].token_ids


def test_the_model_in_the_package_keeps_its_opinions_at_half_the_bytes(make_engine):
    """Log probabilities of a text and the bytes of the weights, against bfloat16. Both engines
    take compiled steps from one cache."""
    readings, held = [], []
    for quantization in (None, "int8"):
        engine = make_engine(TINY_MODEL, quantization=quantization)
        pieces = quality.windows(engine.tokenizer.encode(TEXT), 40)
        readings.append(quality.read(engine, pieces))
        held.append(engine.memory().weights_bytes)
    found = quality.compare(*readings)
    print(found)
    assert 0 < found.mean_difference < 0.15
    assert found.largest_difference < 1
    assert found.same_likeliest > 0.9
    assert found.perplexity_after == pytest.approx(found.perplexity_before, rel=0.05)
    config = read_config(TINY_MODEL)
    embed = 2 * config.vocab_size * config.hidden_size  # stays, and the head is held beside it
    assert held == [weights_bytes(config), weights_bytes(config, quantization="int8")]
    assert held[1] - embed * 1.5 == pytest.approx((held[0] - embed) / 2, rel=0.05)


def test_random_weights_are_made_as_int8(tmp_path, make_engine):
    raw = hf_checkpoints.config_dict(hf_checkpoints.CASES["qwen2_tied"], "bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    told = []
    model, config = load_model(
        tmp_path,
        load_format="dummy",
        quantization="int8",
        progress=lambda done, total: told.append((done, total)),
    )
    assert told[-1] == (weights_bytes(config, quantization="int8"),) * 2
    params = model.named_params()
    for name, held in held_params(config, "int8").items():
        if held.dtype != "int8":
            continue
        values = np.asarray(params[name])
        assert values.min() == -127
        assert values.max() == 127
        weights = values * np.asarray(params[scale_of(name)])[..., None]
        assert weights.std() == pytest.approx(values.shape[-1] ** -0.5, rel=0.05), name
    engine = make_engine(tmp_path, load_format="dummy", quantization="int8")
    assert len(engine.generate([5, 6, 7], greedy(8))[0].token_ids) == 8


def test_other_devices_refuse_it(tiny_checkpoint, make_engine, monkeypatch):
    cpu = ellm_jax.assembly.open_devices("cpu", 1)[0]
    cpu.platform = "cuda"
    monkeypatch.setattr(ellm_jax.assembly, "open_devices", lambda *_: [cpu])
    with pytest.raises(ValueError, match=r"quantization='int8': the cuda backend.*device='cpu'"):
        make_engine(tiny_checkpoint("llama"), quantization="int8")


def test_windows_cover_a_text():
    assert quality.windows(range(7), 3) == [[0, 1, 2], [3, 4, 5]]
    assert quality.windows(range(8), 3) == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert quality.windows([1], 3) == []


def test_differences_are_counted_by_hand():
    from ellm_jax.outputs import TokenLogprobs

    before = [TokenLogprobs(1, -1.0, 1, ((1, -1.0),)), TokenLogprobs(2, -3.0, 2, ((5, -0.5),))]
    after = [replace(before[0], logprob=-1.5), replace(before[1], logprob=-2.5, top=((2, -2.5),))]
    found = quality.compare(before, after)
    assert found.tokens == 2
    assert found.perplexity_before == found.perplexity_after == pytest.approx(np.exp(2))
    assert (found.mean_difference, found.largest_difference) == (0.5, 0.5)
    assert found.same_likeliest == 0.5


def test_the_command_measures_quality(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    line = ["bench", "quality", "--text", str(text), "--device-memory", "64MiB", "--quiet"]
    line += ["--no-warm-up", "--window", "40"]
    assert main([*line, "--quantization", "int8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] > 40
    assert found["dtype"] == "bfloat16"
    assert 0 < found["mean_difference"] < 0.15
    assert main(line) == 2
    assert "nothing to compare" in capsys.readouterr().err
