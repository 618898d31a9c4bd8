"""Attention on the device against numpy in float64, and the bits of a row against itself."""

from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest
from attention_slots import DTYPES, DeviceSlots, Shape, relative_error

from ellm_jax import _native as native
from ellm_jax.runtime import cuda_ops
from ellm_jax.runtime.batch import Span, StepLayout
from ellm_jax.runtime.shapes import StepShape

pytestmark = pytest.mark.gpu

# Rounding of the weights and of the result, for rows that average many values.
TOLERANCE = {"float32": 3e-6, "bfloat16": 1e-2, "float16": 2e-3}

MakeSlots = Callable[..., DeviceSlots]


@pytest.fixture
def make_slots(device: str) -> Iterator[MakeSlots]:
    made: list[DeviceSlots] = []

    def make(shape: Shape, **sizes: int) -> DeviceSlots:
        if device == "cpu" and shape.dtype == "float16":
            pytest.skip("the CPU's kernels know no float16")
        made.append(DeviceSlots(device, shape, **sizes))
        return made[-1]

    yield make
    for slots in made:
        slots.close()


@pytest.fixture
def cuda_only(device: str) -> None:
    if device != "cuda":
        pytest.skip("about the kernels of a GPU")


def check_step(slots, rng, spans, rows, seed, sampled=None, layer=1, sequences=8):
    """Runs a step and compares its rows, or some of each span, with float64."""
    used = sum(count for _, count in spans)
    qkv = slots.random(rng, used)
    out = slots.step(spans, qkv, rows=rows, layer=layer, sequences=sequences)
    assert not out[used:].astype(np.float32).any(), f"padding is not zero, seed {seed}"
    at = 0
    for slot, count in spans:
        first = slots.tokens(slot, layer) - count
        picked = range(count) if sampled is None else {0, count - 1, *rng.integers(count, size=8)}
        for i in sorted(picked):
            want = slots.reference(slot, first + i, qkv[0][at + i], layer)
            error = relative_error(out[at + i], want)
            assert error < TOLERANCE[slots.shape.dtype], (
                f"{slots.shape}, position {first + i} of slot {slot}, seed {seed}: {error}"
            )
        at += count


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("kv_heads", "group"), [(2, 1), (2, 4), (1, 7), (1, 20)])
def test_prompts_and_decodes_in_one_step(make_slots, dtype, head_dim, kv_heads, group):
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    rng = np.random.default_rng(seed)
    slots = make_slots(Shape(dtype, kv_heads, group, head_dim))
    for spans in (
        [(0, 300), (1, 3)],
        [(0, 1), (2, 41), (1, 1), (3, 64)],
        [(1, 65), (0, 1), (3, 1), (2, 1)],
        [(0, 1), (1, 1), (2, 1), (3, 1)],
    ):
        check_step(slots, rng, spans, 400, seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "soft_cap"), [(1, 0.0), (100, 0.0), (700, 5.0), (0, 30.0)])
def test_windows_and_soft_caps(make_slots, dtype, window, soft_cap):
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    rng = np.random.default_rng(seed)
    slots = make_slots(Shape(dtype, 2, 4, 128, window, soft_cap))
    check_step(slots, rng, [(0, 900), (1, 200)], 1100, seed, sampled=8)
    check_step(slots, rng, [(0, 1), (1, 130), (2, 77)], 256, seed)
    check_step(slots, rng, [(0, 1), (1, 1), (2, 1)], 8, seed)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head_dim", [20, 34])
def test_head_sizes_that_tensor_cores_do_not_take(make_slots, dtype, head_dim):
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    rng = np.random.default_rng(seed)
    slots = make_slots(Shape(dtype, 2, 2, head_dim))
    check_step(slots, rng, [(0, 70), (1, 5)], 80, seed)
    check_step(slots, rng, [(1, 1), (0, 1)], 2, seed)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_contexts_from_one_token_to_32k(make_slots, device, dtype):
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    rng = np.random.default_rng(seed)
    longest = 32768 if device == "cuda" and dtype == "bfloat16" else 4096
    lengths = [n for n in (1, 255, 256, 257, 2048, 8191, 32768 - 256) if n < longest]
    slots = make_slots(Shape(dtype, 2, 4, 128), max_tokens=longest, slots=len(lengths))
    for slot, length in enumerate(lengths):
        check_step(slots, rng, [(slot, length)], None, seed, sampled=8)
    for _ in range(2):
        check_step(slots, rng, [(slot, 1) for slot in range(len(lengths))], 8, seed)
    # A piece of a prompt after a long context, beside decodes.
    check_step(slots, rng, [(0, 1), (len(lengths) - 1, 200), (1, 1)], 256, seed, sampled=8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_decoded_row_has_the_same_bits_alone_and_in_a_batch(make_slots, dtype):
    seed = 3
    rng = np.random.default_rng(seed)
    shape = Shape(dtype, 2, 4, 128)
    alone, among = (make_slots(shape) for _ in range(2))
    prompt = alone.random(rng, 1500)
    others = [among.random(rng, n) for n in (700, 33)]
    alone.step([(0, 1500)], prompt)
    among.step([(0, 1500)], prompt)
    among.step([(1, 700), (2, 33)], [np.concatenate(pair) for pair in zip(*others, strict=True)])
    for _ in range(3):
        row, noise = alone.random(rng, 1), among.random(rng, 10)
        want = alone.step([(0, 1)], row, rows=1, sequences=1)[0]
        mixed = [np.concatenate([n[:9], r, n[9:]]) for r, n in zip(row, noise, strict=True)]
        got = among.step([(1, 9), (0, 1), (2, 1)], mixed, rows=64)[9]
        np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8), f"seed {seed}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prompt_has_the_same_bits_in_any_pieces(make_slots, dtype):
    seed = 5
    rng = np.random.default_rng(seed)
    shape = Shape(dtype, 2, 4, 128)
    tokens = 1100
    whole = make_slots(shape)
    prompt = whole.random(rng, tokens)
    want = whole.step([(0, tokens)], prompt)
    # A piece of one token is decoded, in another order than a prompt where it is not float32.
    for pieces in ([2, 500, 98, 500], [77, 1023]):
        divided = make_slots(shape)
        at = 0
        for count in pieces:
            noise = divided.random(rng, 5)
            piece = [
                np.concatenate([n, x[at : at + count]]) for n, x in zip(noise, prompt, strict=True)
            ]
            got = divided.step([(1, 5), (0, count)], piece)[5 : 5 + count]
            np.testing.assert_array_equal(
                got.view(np.uint8), want[at : at + count].view(np.uint8), f"{pieces}, seed {seed}"
            )
            at += count


def test_layers_and_slots_do_not_disturb_each_other(make_slots):
    """K and V of a step go to one layer of their slots: what lies beside comes out as before."""
    seed = 7
    rng = np.random.default_rng(seed)
    slots = make_slots(Shape("bfloat16", 2, 2, 64))
    for layer in (1, 0):
        check_step(slots, rng, [(0, 200), (1, 200), (2, 17)], 420, seed, sampled=8, layer=layer)
    for layer in (0, 1):
        for slot in (1, 0, 2, 1):
            check_step(slots, rng, [(slot, 30)], 32, seed, layer=layer)
        check_step(slots, rng, [(0, 1), (1, 1), (2, 1)], 8, seed, layer=layer)


def test_a_slot_may_end_at_its_only_chunk(make_slots):
    """Nothing past the last token is read, not even where the next tile of a kernel would be."""
    seed = 11
    rng = np.random.default_rng(seed)
    slots = make_slots(Shape("bfloat16", 2, 4, 128))
    tile = slots.kv.layout.tile_tokens
    check_step(slots, rng, [(0, tile - 3)], None, seed, sampled=8)
    for _ in range(3):
        check_step(slots, rng, [(0, 1)], 8, seed)
    assert slots.kv.mapped_tokens(0) == tile


def test_parts_of_many_rows_are_merged_whoever_comes_last(make_slots):
    seed = 13
    rng = np.random.default_rng(seed)
    batch = 24
    slots = make_slots(Shape("bfloat16", 2, 4, 128), slots=batch, max_tokens=2048)
    for slot in range(batch):
        check_step(slots, rng, [(slot, 1000 + 40 * slot)], 2048, seed, sampled=1)
    for _ in range(10):
        check_step(slots, rng, [(slot, 1) for slot in range(batch)], 24, seed, sequences=batch)


@pytest.mark.usefixtures("cuda_only")
def test_a_prompt_in_a_step_for_decodes_is_refused_or_nan(make_slots):
    slots = make_slots(Shape())
    qkv = slots.random(np.random.default_rng(0), 3)
    out = slots.step([(0, 3)], qkv, rows=8, checked=False).astype(np.float32)
    assert np.isnan(out[:3]).all()
    assert not out[3:].any()
    layout = StepLayout(StepShape(8, 8), slots.kv.layout.num_slots)
    with pytest.raises(ValueError, match="3 rows for 1 sequences"):
        cuda_ops.check_step(slots.kv, layout.pack(slots.kv.id, [Span(0, 0, [0] * 3, True)]))


def test_a_step_without_sequences_clears_its_rows(make_slots):
    slots = make_slots(Shape())
    out = slots.step([], slots.random(np.random.default_rng(0), 0), rows=8)
    assert not out.astype(np.float32).any()


@pytest.mark.usefixtures("cuda_only")
def test_an_unknown_cache_is_an_error_that_says_so(make_slots):
    slots = make_slots(Shape())
    q, k, v = slots.random(np.random.default_rng(0), 8)
    meta = StepLayout(StepShape(8, 8), 8).pack(0, [Span(0, 0, [0] * 8, True)])

    def call(kv_id, max_tokens):
        layer = np.int32(0)
        epoch = jax.numpy.zeros(1, np.int32)
        sizes = {"kv_id": kv_id, "sequences": 8, "max_tokens": max_tokens, "scale": 1.0}
        return jax.block_until_ready(
            jax.jit(lambda *a: cuda_ops.attention(*a, **sizes))(q, k, v, meta, layer, layer, epoch)
        )

    with pytest.raises(jax.errors.JaxRuntimeError, match="no KV cache has id 12345"):
        call(12345, 4096)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"workspace has \d+ bytes and needs"):
        call(slots.kv.id, 16)
    host_layout = native.KvLayout.choose(2, 2, 128, 2, 4096, 8)
    host = native.KvCache(native.Pool(host_layout.chunk_bytes, 1 << 20), host_layout)
    with pytest.raises(jax.errors.JaxRuntimeError, match="not in device memory"):
        call(host.id, 4096)


@pytest.mark.usefixtures("cuda_only")
def test_the_weights_of_a_scanned_product_are_not_copied():
    """XLA fuses the slice of the stacked weights into the product: no copy of one is held."""
    layers, width = 4, 2048
    weights = jax.ShapeDtypeStruct((layers, width, width), jax.numpy.bfloat16)

    def step(x, weights):
        ops = cuda_ops.CudaOps(jax.numpy.zeros(8, np.int32), None, kv_id=0, max_tokens=1)

        def block(x, layer):
            return ops.linear(x, weights, layer), None

        x, _ = jax.lax.scan(block, x, jax.numpy.arange(layers - 1, dtype=np.int32))
        return ops.linear(x, weights, jax.numpy.int32(layers - 1))

    for rows in (1, 32, 512):
        x = jax.ShapeDtypeStruct((rows, width), jax.numpy.bfloat16)
        jitted = jax.jit(step, compiler_options=cuda_ops.COMPILER_OPTIONS)
        need = jitted.lower(x, weights).compile().memory_analysis().temp_size_in_bytes
        assert need < width * width * 2, f"{rows} rows: a step takes {need} bytes"
