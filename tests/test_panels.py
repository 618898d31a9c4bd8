"""bfloat16 weights in panels: the operation, and what of a model is loaded so."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ellm_jax import _native
from ellm_jax.checkpoint import convert, in_panels, load_model, read_config, weights_bytes
from ellm_jax.checkpoint.panel_weights import PanelsPart
from ellm_jax.models import held_params
from ellm_jax.models.quantization import PANELS, quantization_of
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
        pairs = rows.reshape(len(rows), -1, 2)
        panels.append(pairs.swapaxes(0, 1).reshape(-1))
    return np.concatenate(panels).reshape(matrix.shape)


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
    plain = XlaOps().linear_panels(jnp.asarray(x), jnp.asarray(panels), jnp.int32(2), out_dtype)
    by_row = XlaOps().linear(jnp.asarray(x), jnp.asarray(w), jnp.int32(2), out_dtype)
    np.testing.assert_array_equal(np.asarray(plain), np.asarray(by_row))


def test_linear_refuses_what_cannot_lie_in_panels():
    one, layer = np.array([1], np.int32), jnp.int32(0)
    for x, w in (
        (np.ones((1, 7), BFLOAT16), np.ones((1, 4, 7), BFLOAT16)),
        (np.ones((1, 8), np.float32), np.ones((1, 4, 8), np.float32)),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match="even number of inputs"):
            jax.block_until_ready(ops.linear(x, w, layer, one, "float32", panels=True))


def test_packing_refuses_arrays_that_do_not_fit():
    rows, panels = np.ones((4, 8), np.uint16), np.ones((6, 8), np.uint16)
    for first in (-1, 3):
        with pytest.raises(ValueError, match="do not fit"):
            _native.pack_panels(rows, first, panels)
    with pytest.raises(ValueError, match="do not fit"):
        _native.pack_panels(rows[:, :7].copy(), 0, panels[:, :7].copy())
    with pytest.raises(TypeError):
        _native.pack_panels(rows.astype(np.float32), 0, panels)


@pytest.mark.parametrize("name", ["llama_bias_linear", "qwen2_tied", "qwen3_head128"])
@pytest.mark.parametrize("orbax", [False, True])
def test_matrices_are_loaded_into_panels_and_nothing_else_is(
    name, orbax, tiny_checkpoint, tmp_path
):
    path = tiny_checkpoint(name)
    if orbax:
        path = convert(path, tmp_path / "converted", dtype="bfloat16", progress=False)
    config = read_config(path)
    chosen = in_panels(config, None, WHOLE)
    before = load_model(path, dtype="bfloat16")[0].named_params()
    after = load_model(path, dtype="bfloat16", quantization=chosen)[0].named_params()
    assert weights_bytes(config, "bfloat16", quantization=chosen) == weights_bytes(
        config, "bfloat16"
    )
    head = [] if config.tie_embeddings else ["lm_head"]
    assert after.keys() == before.keys()
    for param, array in before.items():
        expected = np.asarray(array)
        if param in MATRICES + head:
            matrices = expected.reshape(-1, *expected.shape[-2:])
            expected = np.stack([by_hand(matrix) for matrix in matrices]).reshape(expected.shape)
        np.testing.assert_array_equal(np.asarray(after[param]), expected, err_msg=param)


@pytest.mark.parametrize("seed", range(5))
def test_rows_may_come_in_any_number_at_a_time(seed, tiny_checkpoint):
    rng = np.random.default_rng(seed)
    config = read_config(tiny_checkpoint("llama_bias_linear"))
    held = held_params(config, in_panels(config, None, WHOLE))
    for name, shards in (("lm_head", WHOLE), ("blocks.down", WHOLE), ("blocks.qkv", Shards(2))):
        shape = shards.part_shape(name, held[name].shape)
        whole = random_matrix(rng, *shape)
        rows = whole.reshape(-1, shape[-1])
        part = PanelsPart(name, held, shards)
        begin, full = 0, False
        while not full:
            assert begin < len(rows)
            end = min(len(rows), begin + int(rng.integers(1, 100)))
            full = part.add(rows[begin:end])
            begin = end
        assert begin == len(rows)
        ((found, values),) = part.params()
        expected = np.stack([by_hand(matrix) for matrix in whole.reshape(-1, *shape[-2:])])
        assert found == name
        np.testing.assert_array_equal(values, expected.reshape(shape))


def test_what_is_quantised_or_looked_up_or_odd_stays_as_it_is(tiny_checkpoint):
    config = read_config(tiny_checkpoint("llama_bias_linear"))
    chosen = in_panels(config, None, WHOLE)
    assert (chosen.name, chosen.blocks, chosen.head) == ("bfloat16", PANELS, PANELS)
    int8 = quantization_of("int8")
    assert in_panels(config, "int8", WHOLE) == int8
    stored = replace(int8, head=None)
    assert in_panels(config, stored, WHOLE) == replace(int8, head=PANELS)
    tied = read_config(tiny_checkpoint("qwen2_tied"))
    assert in_panels(tied, None, WHOLE).head is None
    odd = replace(config, intermediate_size=config.intermediate_size + 1)
    assert in_panels(odd, None, WHOLE).blocks is None
    # Divided by inputs, a device's part of them counts.
    halved = replace(config, intermediate_size=2 * (config.intermediate_size // 2 | 1))
    assert in_panels(halved, None, Shards(2)).blocks == PANELS
    assert in_panels(halved, None, Shards(2, exact=False)).blocks is None
