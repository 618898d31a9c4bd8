"""Weights in panels: the operations, and what of a model is loaded so."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import packed_checkpoints
import pytest

from ellm_jax import _native
from ellm_jax.checkpoint import (
    convert,
    in_panels,
    load_model,
    read_config,
    resolve_quantization,
    weights_bytes,
)
from ellm_jax.models import Format, Quantization, quantization_of
from ellm_jax.models.ops import Finish
from ellm_jax.models.shards import WHOLE, Shards
from ellm_jax.models.xla_ops import XlaOps
from ellm_jax.runtime import ops

ops.register()

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
MATRICES = ["blocks.qkv", "blocks.o", "blocks.gate_up", "blocks.down"]


def by_hand(matrix):
    """`[N, K]` into panels, as `Format` says."""
    panels = []
    for first in range(0, len(matrix), 64):
        rows = matrix[first : first + 64]
        words = rows.reshape(len(rows), -1, 4 // rows.itemsize)
        panels.append(words.swapaxes(0, 1).reshape(-1))
    return np.concatenate(panels).reshape(matrix.shape)


def by_turns(array, axis=-2):
    """Gates and ups, behind each other along an axis, by turns: 32 of each."""
    gates, ups = np.split(array, 2, axis)
    parts = [
        np.take(half, range(first, first + 32), axis)
        for first in range(0, gates.shape[axis], 32)
        for half in (gates, ups)
    ]
    return np.concatenate(parts, axis)


def random_matrix(rng, *shape):
    return rng.standard_normal(shape).astype(BFLOAT16)


@pytest.mark.parametrize("out_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 7, 34), (3, 200, 64), (9, 130, 80), (70, 96, 48)])
def test_linear(out_dtype, rows, n, k):
    rng = np.random.default_rng(rows * n + k)
    x, w = random_matrix(rng, rows + 2, k), random_matrix(rng, 3, n, k)
    panels = np.stack([by_hand(layer) for layer in w])
    used = np.array([rows], np.int32)
    out = np.asarray(
        jax.jit(lambda *a: ops.linear(*a, out_dtype, panels=True))(x, panels, np.int32(2), used)
    )
    exact = x[:rows].astype(np.float64) @ w[2].astype(np.float64).T
    size = np.abs(x[:rows].astype(np.float64)) @ np.abs(w[2].astype(np.float64)).T
    bound = 1e-6 * size + (np.abs(exact) / 256 if out_dtype == "bfloat16" else 0)
    assert (np.abs(out[:rows].astype(np.float64) - exact) <= bound).all()
    assert not out[rows:].astype(np.float32).any()
    plain = XlaOps().linear(
        jnp.asarray(x), jnp.asarray(panels), jnp.int32(2), out_dtype, panels=True
    )
    by_row = XlaOps().linear(jnp.asarray(x), jnp.asarray(w), jnp.int32(2), out_dtype)
    np.testing.assert_array_equal(np.asarray(plain), np.asarray(by_row))


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("in_int8", [False, True])
@pytest.mark.parametrize("steps", ["bias", "add", "bias add", "gated", "bias gated"])
def test_what_follows_in_a_call_is_the_same_as_after_it(rows, in_int8, steps):
    if in_int8 and not _native.int8_panels():
        pytest.skip("needs AVX-512 VNNI")
    rng = np.random.default_rng(rows)
    n, k, used, layer = 192, 96, np.array([rows], np.int32), jnp.int32(1)
    x, bias = random_matrix(rng, rows + 2, k), random_matrix(rng, n)
    add = random_matrix(rng, rows + 2, n)
    w, scale = random_matrix(rng, 2, n, k), rng.uniform(0.001, 0.1, (2, n)).astype(np.float32)
    if in_int8:
        w = rng.integers(-127, 128, (2, n, k), np.int8)

    def multiplied(x, w, scale, finish=None):
        panels = np.stack([by_hand(matrix) for matrix in w])
        if in_int8:
            return ops.linear_int8(
                x, panels, scale, layer, used, "bfloat16", panels=True, finish=finish
            )
        return ops.linear(x, panels, layer, used, "bfloat16", panels=True, finish=finish)

    want = multiplied(x, w, scale)
    if "bias" in steps:
        want = want + bias
    if "add" in steps:
        want = want + add
    if "gated" in steps:
        want = ops.silu_mul(want, used)
        w, scale, bias = by_turns(w), by_turns(scale, -1), by_turns(bias, -1)
    finish = Finish(
        bias if "bias" in steps else None, add if "add" in steps else None, "gated" in steps
    )
    out = jax.jit(lambda x: multiplied(x, w, scale, finish))(x)
    assert out.shape == want.shape
    np.testing.assert_array_equal(np.asarray(out)[:rows], np.asarray(want)[:rows])
    assert not np.asarray(out)[rows:].astype(np.float32).any()

    panels = np.stack([by_hand(matrix) for matrix in w])
    x = jnp.asarray(x)
    if in_int8:
        plain = XlaOps().linear_int8(x, panels, scale, layer, None, panels=True, finish=finish)
    else:
        plain = XlaOps().linear(x, jnp.asarray(panels), layer, None, panels=True, finish=finish)
    exact = np.asarray(want)[:rows].astype(np.float32)
    error = np.abs(np.asarray(plain)[:rows].astype(np.float32) - exact)
    assert (error <= np.abs(exact) / 64 + 1e-2 * np.abs(exact).max()).all()


def test_linear_refuses_what_cannot_follow_in_a_call():
    one, layer = np.array([1], np.int32), jnp.int32(0)
    x, w = np.ones((1, 8), BFLOAT16), np.ones((1, 96, 8), BFLOAT16)
    row = np.ones((1, 96), BFLOAT16)
    for finish, panels, dtype, message in (
        (Finish(add=row), False, "bfloat16", "take weights in panels"),
        (Finish(add=row), True, "float32", "a result in bfloat16"),
        (Finish(bias=row[0, :5]), True, "bfloat16", "of these sizes"),
        (Finish(add=row.astype(np.float32)), True, "bfloat16", "of these sizes"),
        (Finish(gated=True), True, "bfloat16", "a multiple of 64"),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            jax.block_until_ready(ops.linear(x, w, layer, one, dtype, panels=panels, finish=finish))


def test_linear_refuses_what_cannot_lie_cannot_lie_in_panels():
    one, layer = np.array([1], np.int32), jnp.int32(0)
    for x, w in (
        (np.ones((1, 7), BFLOAT16), np.ones((1, 4, 7), BFLOAT16)),
        (np.ones((1, 8), np.float32), np.ones((1, 4, 8), np.float32)),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match="even number of inputs"):
            jax.block_until_ready(ops.linear(x, w, layer, one, "float32", panels=True))


@pytest.mark.skipif(not _native.int8_panels(), reason="needs AVX-512 VNNI")
@pytest.mark.parametrize("out_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 7, 36), (3, 200, 64), (9, 130, 80), (70, 96, 48)])
def test_linear_int8(out_dtype, rows, n, k):
    """The bits of weights that lie row by row."""
    rng = np.random.default_rng(rows * n + k)
    x = random_matrix(rng, rows + 2, k)
    w = rng.integers(-127, 128, (3, n, k), np.int8)
    scale = rng.uniform(0.001, 0.1, (3, n)).astype(np.float32)
    panels = np.stack([by_hand(layer) for layer in w])
    used, layer = np.array([rows], np.int32), jnp.int32(2)
    by_row = ops.linear_int8(x, w, scale, layer, used, out_dtype)
    out = ops.linear_int8(x, panels, scale, layer, used, out_dtype, panels=True)
    np.testing.assert_array_equal(np.asarray(out), np.asarray(by_row))
    plain = XlaOps()
    np.testing.assert_array_equal(
        np.asarray(plain.linear_int8(jnp.asarray(x), panels, scale, layer, out_dtype, panels=True)),
        np.asarray(plain.linear_int8(jnp.asarray(x), w, scale, layer, out_dtype)),
    )


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("name", ["llama_bias_linear", "qwen2_tied", "qwen3_head128"])
@pytest.mark.parametrize("orbax", [False, True])
def test_matrices_are_loaded_into_panels_and_nothing_else_is(
    name, orbax, quantization, tiny_checkpoint, tmp_path
):
    path = tiny_checkpoint(name)
    if orbax:
        path = convert(path, tmp_path / "converted", dtype="bfloat16", progress=False)
    check_loaded(path, quantization)


@pytest.mark.skipif(not _native.int8_panels(), reason="needs AVX-512 VNNI")
def test_int8_that_is_stored_goes_into_panels_as_it_is(tmp_path):
    settings = packed_checkpoints.compressed_config("int-quantized", 8, 0, True)
    path, _ = packed_checkpoints.make_packed(
        tmp_path / "int8",
        "llama_bias_linear",
        settings,
        packed_checkpoints.int_quantized,
        bits=8,
        group=0,
    )
    stored = resolve_quantization(path, read_config(path), None)
    assert stored is not None
    assert stored.blocks == Format(8)
    check_loaded(path, stored)


def check_loaded(path, quantization):
    """What of a checkpoint lies in panels holds the values that lie row by row otherwise."""
    config = read_config(path)
    chosen = in_panels(config, quantization, WHOLE)
    before = load_model(path, dtype="bfloat16", quantization=quantization)[0].named_params()
    after = load_model(path, dtype="bfloat16", quantization=chosen)[0].named_params()
    assert weights_bytes(config, "bfloat16", quantization=chosen) == weights_bytes(
        config, "bfloat16", quantization=quantization
    )
    matrices = [name for name in before if (form := chosen.format_of(name)) and form.panels]
    if quantization is None:
        head = [] if config.tie_embeddings else ["lm_head"]
        assert sorted(matrices) == sorted(MATRICES + head)
    assert quantization != "int4" or set(matrices) <= {"lm_head"}
    assert after.keys() == before.keys()
    for param, array in before.items():
        expected = np.asarray(array)
        if param.startswith("blocks.gate_up") and chosen.by_turns:
            expected = by_turns(expected, -2 if param in matrices else -1)
        if param in matrices:
            layers = expected.reshape(-1, *expected.shape[-2:])
            expected = np.stack([by_hand(layer) for layer in layers]).reshape(expected.shape)
        np.testing.assert_array_equal(np.asarray(after[param]), expected, err_msg=param)


def test_what_is_looked_up_or_odd_stays_as_it_is(tiny_checkpoint):
    config = read_config(tiny_checkpoint("llama_bias_linear"))
    panels, int8 = Format(16, panels=True), quantization_of("int8")
    assert config.intermediate_size % 32 == 0
    chosen = in_panels(config, None, WHOLE)
    assert chosen == Quantization("bfloat16", panels, panels, by_turns=True)
    in_int8 = in_panels(config, "int8", WHOLE)
    assert in_int8.blocks == in_int8.head == Format(8, panels=_native.int8_panels())
    assert in_int8.by_turns == _native.int8_panels()
    assert in_panels(config, replace(int8, head=None), WHOLE).head == panels
    int4 = in_panels(config, "int4", WHOLE)
    assert int4 == replace(quantization_of("int4"), head=in_int8.head)
    tied = read_config(tiny_checkpoint("qwen2_tied"))
    assert in_panels(tied, None, WHOLE).head is None
    odd = replace(config, intermediate_size=config.intermediate_size + 1)
    assert in_panels(odd, None, WHOLE).blocks is None
    even = replace(config, intermediate_size=2 * (config.intermediate_size // 2 | 1))
    assert in_panels(even, None, WHOLE) == replace(chosen, by_turns=False)
    assert in_panels(even, "int8", WHOLE) == int8  # Four to a word.
    # Divided by inputs, a device's part of them counts.
    assert in_panels(even, None, Shards(2)).blocks == panels
    assert in_panels(even, None, Shards(2, exact=False)).blocks is None
