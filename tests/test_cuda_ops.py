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
from ellm_jax.bench import cuda_kernels
from ellm_jax.checkpoint.directory import read_config
from ellm_jax.models.decoder import Decoder
from ellm_jax.models.xla_ops import XlaOps
from ellm_jax.runtime import cuda_ops
from ellm_jax.runtime.batch import Span, StepLayout, sequences_of
from ellm_jax.runtime.buckets import Buckets
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
        "operand_index = 6",
    ):
        assert attribute in call, f"{attribute} is not in {call}"
    workspace = _native.cuda_attention_workspace_bytes("bfloat16", ROWS, SEQS, 32, 8, 128, 4096)
    assert f"tensor<{workspace}xui8>" in call
    assert "tensor<64x32x128xbf16>, tensor<1xi32>" in call
    assert "concatenate" not in text, "layer and window go in as they are, without a kernel"


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
    assert bytes_of(rows=9) > bytes_of(rows=8), "only more rows than sequences hold a prompt"
    with pytest.raises(ValueError, match="int8"):
        bytes_of("int8")
    with pytest.raises(ValueError, match="multiple"):
        bytes_of(q=30)


def test_xla_knows_the_options_of_a_step():
    compiled = jax.jit(lambda x: x + 1, compiler_options=cuda_ops.COMPILER_OPTIONS)
    assert compiled(np.int32(1)) == 2
    wrong = cuda_ops.COMPILER_OPTIONS | {"xla_gpu_enable_command_buffer": "FUSION,NO_SUCH_KIND"}
    with pytest.raises(jax.errors.JaxRuntimeError, match="NO_SUCH_KIND"):
        jax.jit(lambda x: x + 2, compiler_options=wrong)(np.int32(1))


def test_a_prompt_in_a_shape_for_decodes_is_refused():
    layout = _native.KvLayout.choose(2, 2, 64, 4, 1024, 4)
    kv = _native.KvCache(_native.Pool(layout.chunk_bytes, 64 * layout.chunk_bytes), layout)
    kv.extend([kv.take_slot(0), kv.take_slot(0)], [20, 20])

    def check(shape, *counts):
        spans = [Span(slot, 0, [7] * count, True) for slot, count in enumerate(counts)]
        cuda_ops.check_step(kv, StepLayout(shape, layout.num_slots).pack(kv.id, spans))

    check(StepShape(4, 4), 1, 1)
    check(StepShape(5, 4), 2, 1)
    for shape in (StepShape(4, 4), StepShape(3, 4)):
        with pytest.raises(ValueError, match=r"3 rows for 2 sequences .* take the shape from"):
            check(shape, 2, 1)
    mapped = kv.mapped_tokens(0)
    with pytest.raises(RuntimeError, match=f"only {mapped} tokens are mapped"):
        check(StepShape(mapped + 1, 4), mapped + 1)


@pytest.mark.parametrize(("most", "tokens"), [(1, 1), (4, 2), (24, 512), (64, 32), (300, 8192)])
def test_buckets_where_padding_is_computed_keep_prompts_from_decodes(most, tokens):
    buckets = Buckets(most, tokens, skips_padding=False)
    every = buckets.every()
    sizes = sorted({*range(1, 70), most, tokens, buckets.max_rows} & {*range(1, 8193)})
    for seqs in [s for s in sizes if s <= most]:
        for rows in [r for r in sizes if seqs <= r <= max(most, tokens)]:
            fitting = buckets.fit(rows, seqs)
            assert fitting in every
            assert fitting.decodes_only == (rows == seqs)
            assert buckets.covers(fitting, rows, seqs)
            for shape in every:
                room = shape.rows >= rows and shape.seqs >= seqs
                assert buckets.covers(shape, rows, seqs) <= room
                if shape.decodes_only and rows > seqs:
                    assert not buckets.covers(shape, rows, seqs)
    assert buckets.max_rows in (tokens, most + 1)


def test_a_step_is_not_run_on_a_bucket_far_too_large_where_padding_is_computed():
    buckets = Buckets(64, 8192, skips_padding=False)
    assert buckets.fit(5, 5) == StepShape(16, 16)
    assert buckets.fit(40, 1) == StepShape(64, 1)
    assert buckets.covers(StepShape(64, 64), 5, 5)
    assert buckets.covers(StepShape(512, 64), 5, 5)
    assert not buckets.covers(StepShape(1024, 64), 5, 5)
    assert buckets.covers(StepShape(4096, 64), 1000, 5)
    assert not buckets.covers(StepShape(8192, 64), 1000, 5)
    assert Buckets(64, 8192).covers(StepShape(8192, 64), 5, 5)


def test_buckets_where_padding_is_skipped_are_coarse():
    buckets = Buckets(64, 2048)
    assert [buckets.fit(n, n) for n in (1, 2, 5, 17)] == [StepShape(n, n) for n in (1, 4, 16, 64)]
    assert buckets.fit(6, 5) == StepShape(16, 16), "a prompt fits beside decodes"
    assert [buckets.fit(n, 1).rows for n in (2, 33, 129, 513, 1025)] == [32, 128, 512, 1024, 2048]
    assert buckets.covers(StepShape(16, 16), 6, 5)
    assert not buckets.covers(StepShape(16, 16), 17, 5)


def test_a_measurement_that_fails_does_not_hide_the_others(monkeypatch):
    class Findings:
        def __init__(self):
            self.data, self.rows = {}, []

        def add(self, what, value):
            self.rows.append((what, value))

        def add_share(self, what, value, least):
            self.rows.append((what, f"{value:.0%}"))

    def decode_rate(context, layers):
        if (context, layers) == (4096, 32):
            raise RuntimeError("out of memory")
        return cuda_kernels.Rate(context, layers, 1.0, 1.5e12)

    monkeypatch.setattr(cuda_kernels, "copy_rate", lambda: 3e12)
    monkeypatch.setattr(cuda_kernels, "matrix_rate", lambda: 1e15)
    monkeypatch.setattr(cuda_kernels, "decode_rate", decode_rate)
    monkeypatch.setattr(
        cuda_kernels, "prefill_rate", lambda tokens: cuda_kernels.Rate(tokens, 8, 1.0, 6e14)
    )
    findings = Findings()
    with pytest.raises(RuntimeError, match="4,096, 32 layers: out of memory"):
        cuda_kernels.measure(findings)
    rows = dict(findings.rows)
    assert rows["decode attention, batch 32 at 8,192, 32 layers: 1,500 GB/s"] == "50%"
    assert rows["prefill attention of 32,768: 600 TFLOP/s"] == "60%"
    assert "out of memory" in rows["decode attention, batch 32 at 4,096, 32 layers"]
    assert len(findings.data["decode"]) == 7


def test_the_yardsticks_run_anywhere():
    assert cuda_kernels.copy_rate(1 << 16) > 0
    assert cuda_kernels.matrix_rate(64) > 0
