"""The CUDA operations as far as a CPU can tell: what they lower to, and what they compute."""

import re
from functools import partial

import hf_checkpoints
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from ellm_jax import _native
from ellm_jax.checkpoint.directory import read_config
from ellm_jax.models.decoder import Decoder
from ellm_jax.models.xla_ops import XlaOps
from ellm_jax.runtime import cuda_ops
from ellm_jax.runtime.batch import StepLayout, sequences_of
from ellm_jax.runtime.shapes import StepShape

ROWS, SEQS, MAX_TOKENS, SLOTS = 64, 8, 4096, 16


def lower(function, *args):
    """The program for CUDA, which needs no GPU."""
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def words(rows=ROWS, seqs=SEQS):
    return StepLayout(StepShape(rows, seqs), SLOTS).words


def test_attention_lowers_to_the_custom_call():
    q, k = shape(ROWS, 32, 128), shape(ROWS, 8, 128)
    meta, number, epoch = (shape(*s, dtype=jnp.int32) for s in ((words(),), (), (1,)))
    text = lower(
        partial(
            cuda_ops.attention,
            kv_id=7,
            sequences=SEQS,
            max_tokens=MAX_TOKENS,
            scale=0.25,
            soft_cap=30.0,
        ),
        q,
        k,
        k,
        meta,
        number,
        number,
        epoch,
    )
    (call,) = re.findall(r".*custom_call @ellm_attention_cuda.*", text)
    for attribute in (
        "kv_id = 7 : i32",
        f"sequences = {SEQS} : i32",
        "scale = 2.500000e-01 : f32",
        "soft_cap = 3.000000e+01 : f32",
        "has_side_effect = true",
        "operand_tuple_indices = []",
        "output_tuple_indices = [1]",
        "operand_index = 5",
    ):
        assert attribute in call, f"{attribute} is not in {call}"
    workspace = _native.cuda_attention_workspace_bytes("bfloat16", ROWS, SEQS, 32, 8, 128, 4096)
    assert f"tensor<{workspace}xui8>" in call
    assert "tensor<64x32x128xbf16>, tensor<1xi32>" in call


@pytest.mark.parametrize("name", ["llama", "qwen3_head128"])
def test_a_model_lowers_with_one_call_in_its_scan(tmp_path, name):
    config = read_config(hf_checkpoints.make_checkpoint(tmp_path, name))
    graph, weights = nnx.split(
        nnx.eval_shape(lambda: Decoder(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    )

    def forward(weights, meta, tokens, positions, epoch):
        ops = cuda_ops.CudaOps(meta, meta[2:3], kv_id=3, max_tokens=MAX_TOKENS)
        hidden, epoch = nnx.merge(graph, weights)(tokens, positions, ops, epoch)
        return nnx.merge(graph, weights).logits(hidden, ops), epoch

    ints = partial(shape, dtype=jnp.int32)
    text = lower(forward, weights, ints(words()), ints(ROWS), ints(ROWS), ints(1))
    assert text.count("custom_call @ellm_attention_cuda") == 1
    assert "ellm_linear" not in text
    assert "ellm_rms_norm" not in text
    assert text.count("stablehlo.while") == 1


def test_a_linear_layer_slices_the_weights_at_the_layer_and_nothing_else():
    ops = cuda_ops.CudaOps(jnp.zeros(words(), jnp.int32), None, kv_id=1, max_tokens=1)
    text = lower(ops.linear, shape(ROWS, 96), shape(4, 160, 96), shape(dtype=jnp.int32))
    assert text.count("stablehlo.dynamic_slice") == 1
    assert "stablehlo.select" not in text
    assert re.search(r"dot_general.*contracting_dims = \[1\] x \[1\]", text)
    text = lower(
        partial(ops.linear, out_dtype=jnp.float32),
        shape(ROWS, 96),
        shape(4, 160, 96),
        shape(dtype=jnp.int32),
    )
    assert re.search(r"dot_general.*bf16.*bf16.*-> tensor<64x160xf32>", text)
    wide = lower(
        ops.linear,
        shape(ROWS, 96, dtype=jnp.float32),
        shape(4, 160, 96, dtype=jnp.float32),
        shape(dtype=jnp.int32),
    )
    assert "HIGHEST" in wide, "float32 has to be exact"


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_linear_multiplies_by_the_layer(dtype):
    rng = np.random.default_rng(5)
    x = rng.standard_normal((7, 96)).astype(dtype)
    w = rng.standard_normal((3, 40, 96)).astype(dtype)
    ops = cuda_ops.CudaOps(jnp.zeros(8, jnp.int32), None, kv_id=1, max_tokens=1)
    out = np.asarray(jax.jit(ops.linear)(x, w, np.int32(2)), np.float64)
    want = x.astype(np.float64) @ w[2].astype(np.float64).T
    tolerance = 1e-6 if dtype == np.float32 else 8e-3
    assert np.linalg.norm(out - want) < tolerance * np.linalg.norm(want)
    assert cuda_ops.CudaOps.rms_norm is XlaOps.rms_norm


def test_sequences_of_a_layout_are_found_again():
    for rows, seqs in [(1, 1), (8, 8), (512, 1), (512, 64), (100, 7)]:
        assert sequences_of(words(rows, seqs), rows) == seqs


def test_registering_needs_a_build_with_cuda():
    if _native.cuda_ffi_registrations():
        cuda_ops.register()
        assert set(_native.cuda_ffi_registrations()) == {"ellm_attention_cuda"}
        return
    with pytest.raises(RuntimeError, match="no CUDA kernels"):
        cuda_ops.register()
    with pytest.raises(RuntimeError, match="no CUDA kernels"):
        cuda_ops.load_kernels(
            [0], np.float32, rows=8, sequences=8, q_heads=4, kv_heads=2, head_dim=64, max_tokens=64
        )


def test_the_workspace_follows_the_shapes():
    def bytes_of(dtype="bfloat16", rows=64, seqs=8, q=32, kv=8, dim=128, tokens=32768):
        return _native.cuda_attention_workspace_bytes(dtype, rows, seqs, q, kv, dim, tokens)

    # A part of 17 (16, and one that a window may cut) of each decoded row, q head and value.
    values = 8 * 17 * 32 * 128 * 4
    assert values < bytes_of() < 1.1 * values
    assert bytes_of(rows=4) < 0.6 * bytes_of(), "no more rows are decoded than there are"
    assert bytes_of(tokens=256) < bytes_of() / 12, "short contexts are not divided"
    assert bytes_of("float32") == 0, "the exact kernel keeps what it needs in registers"
    assert bytes_of(dim=20) == 0
    with pytest.raises(ValueError, match="int8"):
        bytes_of("int8")
    with pytest.raises(ValueError, match="multiple"):
        bytes_of(q=30)
