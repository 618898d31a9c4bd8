"""int4 weights: the kernel against double precision, loading, and engines that run with them."""

import json

import hf_checkpoints
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from engine_requests import greedy, random_requests
from int4_layout import dequantised, spread, unpacked, up

from ellm_jax import _native
from ellm_jax.assembly import TINY_MODEL
from ellm_jax.bench import quality
from ellm_jax.checkpoint import convert, load_model, read_config, weights_bytes
from ellm_jax.cli import main
from ellm_jax.models import held_params, param_shapes, scale_of
from ellm_jax.models.shards import Shards
from ellm_jax.models.xla_ops import XlaOps
from ellm_jax.runtime import ops

ops.register()

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
TEXT = (
    "Once upon a time there was a little fox who lived near the river. One day the fox found a "
    "red ball under a tree. It was very happy and ran to show it to its friend, the rabbit. "
)
MATRICES = ("blocks.qkv", "blocks.o", "blocks.gate_up", "blocks.down")


def quantised(weights, group):
    """What is held of a matrix."""
    outputs, inputs = weights.shape
    groups = (up(outputs, 16), up(inputs, group))
    values = np.full((*groups, 8 * group), 99, np.uint8)
    scales = np.full((*groups, 16), 99, np.float16)
    bits = weights if weights.dtype == np.float32 else weights.view(np.uint16)
    _native.quantize_int4(bits, values, scales.view(np.uint16))
    return values, scales


def activations(x, group):
    """Rows as they are quantised, in double precision."""
    wide = np.asarray(x, np.float32)
    padded = np.pad(wide, ((0, 0), (0, -wide.shape[1] % group))).reshape(len(wide), -1, group)
    scale = np.abs(padded).max(axis=-1, keepdims=True) / np.float32(127)
    steps = np.rint(padded / np.where(scale == 0, 1, scale))
    return (steps * scale.astype(np.float64)).reshape(len(wide), -1)[:, : wide.shape[1]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("group", [32, 128])
def test_weights_go_to_their_nearest_steps(dtype, group):
    rng = np.random.default_rng(group)
    weights = rng.standard_normal((37, 300)) * 10.0 ** rng.integers(-3, 3, (37, 1))
    weights = weights.astype(DTYPES[dtype])
    weights[4] = 0
    values, scales = quantised(weights, group)
    wide = weights.astype(np.float64)
    scale = spread(scales, 37, 300, group)
    steps = unpacked(values, 37, 300) - 8
    nearest = np.clip(np.rint(wide / np.where(scale == 0, 1, scale)), -8, 7)
    off = np.abs(wide - scale * steps)
    assert (off <= np.abs(wide - scale * nearest) + 1e-5 * np.abs(scale)).all()
    # Rounding to steps of at most a seventh of the largest number would be worse.
    plain = np.pad(np.abs(wide), ((0, 0), (0, -300 % group))).reshape(37, -1, group).max(axis=-1)
    plain = np.repeat(plain / 7, group, axis=1)[:, :300]
    rounded = plain * np.rint(wide / np.where(plain == 0, 1, plain))
    best = np.square(off).sum(axis=1)[wide.any(axis=1)]
    assert (best <= np.square(wide - rounded).sum(axis=1)[wide.any(axis=1)] * 1.001).all()
    assert best.sum() < 0.95 * np.square(wide - rounded).sum()
    assert not dequantised(values, scales, 37, 300, group)[4].any()


def test_packing_keeps_every_step():
    rng = np.random.default_rng(5)
    for outputs, inputs, group in ((1, 1, 32), (16, 32, 32), (37, 300, 128), (40, 97, 32)):
        steps = rng.integers(0, 16, (outputs, inputs), np.uint8)
        values = np.full((up(outputs, 16), up(inputs, group), 8 * group), 99, np.uint8)
        _native.pack_int4(steps, values)
        np.testing.assert_array_equal(unpacked(values, outputs, inputs), steps)
        everything = unpacked(values, values.shape[0] * 16, values.shape[1] * group)
        assert (everything[outputs:] == 8).all()
        assert (everything[:, inputs:] == 8).all()


def test_quantising_refuses_arrays_that_do_not_fit():
    x = np.ones((20, 40), np.float32)
    scales = np.empty((2, 2, 16), np.uint16)
    for shape in ((1, 2, 256), (2, 1, 256), (2, 1, 512), (2, 2, 255)):
        with pytest.raises(ValueError, match="do not fit"):
            _native.quantize_int4(x, np.empty(shape, np.uint8), scales)
    with pytest.raises(ValueError, match="scales"):
        _native.quantize_int4(x, np.empty((2, 2, 256), np.uint8), scales[:, :1].copy())
    with pytest.raises(ValueError, match="do not fit"):
        _native.pack_int4(x.astype(np.uint8), np.empty((3, 2, 256), np.uint8))


@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("out_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 7, 33), (3, 200, 64), (9, 130, 300)])
def test_linear(x_dtype, out_dtype, zeros, group, rows, n, k):
    rng = np.random.default_rng(rows * n + k)
    x = rng.standard_normal((rows + 2, k)).astype(DTYPES[x_dtype])
    steps = rng.integers(0, 16, (3, n, k), np.uint8)
    panels = (3, up(n, 16), up(k, group))
    weight = np.empty((*panels, 8 * group), np.uint8)
    for layer in range(3):
        _native.pack_int4(steps[layer], weight[layer])
    scale = rng.uniform(-0.1, 0.1, (*panels, 16)).astype(np.float16)
    zero = rng.integers(0, 16, (*panels, 16), np.uint8) if zeros else None
    used = np.array([rows], np.int32)
    out = np.asarray(
        jax.jit(lambda x, w, s, z: ops.linear_int4(x, w, s, z, jnp.int32(2), used, n, out_dtype))(
            x, weight, scale, zero
        )
    ).astype(np.float64)
    shift = 8 if zero is None else spread(zero[2], n, k, group)
    dense = spread(scale[2], n, k, group) * (steps[2].astype(np.int64) - shift)
    expected = activations(x[:rows], group) @ dense.T
    size = np.abs(activations(x[:rows], group)) @ np.abs(dense).T
    within = 1e-6 * size + (2**-8 * np.abs(expected) if out_dtype == "bfloat16" else 0)
    assert (np.abs(out[:rows] - expected) <= within).all()
    assert not out[rows:].any()
    exact = np.asarray(x[:rows], np.float64) @ dense.T
    assert np.linalg.norm(out[:rows] - exact) < 0.015 * np.linalg.norm(exact)
    plain = XlaOps().linear_int4(
        jnp.asarray(x[:rows]), weight, scale, zero, jnp.int32(2), n, out_dtype
    )
    difference = np.asarray(plain, np.float64) - expected
    assert np.linalg.norm(difference) < 0.01 * np.linalg.norm(expected)


def test_linear_refuses_shapes_that_do_not_fit():
    x, one = np.ones((1, 40), np.float32), np.array([1], np.int32)

    def call(weight, scale, zero=None, layer=0, n=20):
        jax.block_until_ready(
            ops.linear_int4(
                x,
                np.zeros(weight, np.uint8),
                np.zeros(scale, np.float16),
                zero,
                jnp.int32(layer),
                one,
                n,
                "float32",
            )
        )

    call((1, 2, 2, 256), (1, 2, 2, 16))
    for wrong, complaint in (
        (((1, 2, 2, 256), (1, 2, 1, 16)), "do not fit"),
        (((1, 2, 1, 512), (1, 2, 1, 16)), "32 or 128"),
        (((1, 3, 2, 256), (1, 3, 2, 16)), "3 panels"),
        (((1, 2, 1, 256), (1, 2, 1, 16)), "1 groups"),
        (((1, 2, 2, 256), (1, 2, 2, 16), np.zeros((1, 2, 2, 8), np.uint8)), "zero points"),
        (((1, 2, 2, 256), (1, 2, 2, 16), None, 1), "layer 1 of 1"),
    ):
        with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=complaint):
            call(*wrong)


@pytest.mark.parametrize("name", ["llama_bias_linear", "qwen2_tied", "qwen3_head128"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("orbax", [False, True])
def test_matrices_are_loaded_as_int4_and_nothing_else_is(
    name, dtype, orbax, tiny_checkpoint, tmp_path
):
    path = tiny_checkpoint(name)
    if orbax:
        path = convert(path, tmp_path / "converted", dtype=dtype, progress=False)
    before = load_model(path, dtype=dtype)[0].named_params()
    eight = load_model(path, dtype=dtype, quantization="int8")[0].named_params()
    quantization = "int4" if orbax else "int4-g128"
    group = 32 if orbax else 128
    told = []
    model, config = load_model(
        path,
        dtype=dtype,
        quantization=quantization,
        progress=lambda done, total: told.append((done, total)),
    )
    after = model.named_params()
    held = held_params(config, quantization)
    assert {name: array.shape for name, array in after.items()} == {
        name: param.shape for name, param in held.items()
    }
    for param, array in before.items():
        if param in MATRICES:
            for layer, matrix in enumerate(np.asarray(array)):
                values, scales = quantised(matrix, group)
                np.testing.assert_array_equal(after[param][layer], values)
                np.testing.assert_array_equal(after[scale_of(param)][layer], scales)
        elif param != "lm_head":
            np.testing.assert_array_equal(after[param], array)
    for param in ("lm_head", "lm_head_scale"):
        np.testing.assert_array_equal(after[param], eight[param])
    bytes_held = sum(array.nbytes for array in after.values())
    assert bytes_held == weights_bytes(config, dtype, quantization=quantization)
    assert told[-1] == (weights_bytes(config, dtype),) * 2


@pytest.mark.parametrize("quantization", ["int4", "int4-g128"])
def test_parts_of_devices_are_those_of_the_whole(quantization, tiny_checkpoint):
    """With 96 outputs on two devices: 48 each, three panels of six."""
    config = read_config(tiny_checkpoint("qwen2_tied"))
    two = Shards(2)
    held = held_params(config, quantization)
    for name in MATRICES:
        outputs = param_shapes(config)[name][-2]
        for param in (name, scale_of(name)):
            part = two.part_shape(param, held[param].shape)
            assert part[1] == up(up(outputs, 2), 16), param
            assert part[:1] + part[2:] == held[param].shape[:1] + held[param].shape[2:]
    whole, each = (
        weights_bytes(config, None, quantization=quantization),
        weights_bytes(config, None, two, quantization),
    )
    assert whole / 2 < each < whole * 0.55


@pytest.mark.parametrize("name", ["llama_bias_linear", "qwen2_tied"])
@pytest.mark.parametrize("quantization", ["int4", "int4-g128"])
def test_greedy_tokens_are_the_same_alone_and_in_a_batch(
    name, quantization, tiny_checkpoint, make_engine
):
    seed = 4
    requests = random_requests(seed, 12, prompt=(5, 90), output=(8, 40))
    engine = make_engine(
        tiny_checkpoint(name), dtype="bfloat16", quantization=quantization, max_batch_tokens=48
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


def test_the_model_in_the_package_keeps_its_opinions_at_a_quarter_of_the_bytes(make_engine):
    """Log probabilities of a text and the bytes of the weights, against bfloat16."""
    readings, held = [], []
    for quantization in (None, "int4"):
        engine = make_engine(TINY_MODEL, quantization=quantization)
        pieces = quality.windows(engine.tokenizer.encode(TEXT), 40)
        readings.append(quality.read(engine, pieces))
        held.append(engine.memory().weights_bytes)
    found = quality.compare(*readings)
    print(found)
    # Its 2 million weights are few for so few bits; larger models lose less.
    assert 0 < found.mean_difference < 0.8
    assert found.same_likeliest > 0.7
    assert found.perplexity_after == pytest.approx(found.perplexity_before, rel=0.5)
    config = read_config(TINY_MODEL)
    assert held == [weights_bytes(config), weights_bytes(config, quantization="int4")]
    shapes = param_shapes(config)
    matrices = sum(int(np.prod(shapes[name])) for name in MATRICES)
    head = config.vocab_size * (config.hidden_size + 4)
    assert held[1] == held[0] - 2 * matrices + matrices * (4 + 0.5) / 8 + head


def test_random_weights_are_made_as_int4(tmp_path, make_engine):
    raw = hf_checkpoints.config_dict(hf_checkpoints.CASES["qwen2_tied"], "bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    told = []
    model, config = load_model(
        tmp_path,
        load_format="dummy",
        quantization="int4",
        progress=lambda done, total: told.append((done, total)),
    )
    assert told[-1] == (weights_bytes(config, quantization="int4"),) * 2
    params = model.named_params()
    for name in MATRICES:
        outputs, inputs = param_shapes(config)[name][-2:]
        values, scales = np.asarray(params[name])[1], np.asarray(params[scale_of(name)])[1]
        weights = dequantised(values, scales, outputs, inputs, 32)
        assert weights.std() == pytest.approx(inputs**-0.5, rel=0.05), name
        assert abs(weights.mean()) < 0.05 * weights.std()
        assert weights.max() == -weights.min()
    engine = make_engine(tmp_path, load_format="dummy", quantization="int4")
    assert len(engine.generate([5, 6, 7], greedy(8))[0].token_ids) == 8


def test_the_command_measures_quality(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    line = ["bench", "quality", "--text", str(text), "--device-memory", "64MiB", "--quiet"]
    line += ["--no-warm-up", "--window", "40"]
    assert main([*line, "--quantization", "int4-g128", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] > 40
    assert 0 < found["mean_difference"] < 2
