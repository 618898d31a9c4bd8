"""The custom calls against numpy in float64, and the bits of a row against itself elsewhere."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ellm_jax import _native
from ellm_jax.models.ops import HeadNorms
from ellm_jax.runtime import ops
from ellm_jax.runtime.batch import Span, StepLayout, StepShape

ops.register()

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def make_kv(*, layers=2, kv_heads=2, head_dim=64, dtype="float32", max_tokens=4096, slots=4):
    itemsize = np.dtype(DTYPES[dtype]).itemsize
    layout = _native.KvLayout.choose(layers, kv_heads, head_dim, itemsize, max_tokens, slots)
    pool = _native.Pool(layout.chunk_bytes, 64 << 20)
    return _native.KvCache(pool, layout)


def attention_call(soft_cap):
    @jax.jit
    def call(q, k, v, meta, layer, window, epoch):
        scale = q.shape[-1] ** -0.5
        return ops.attention(q, k, v, meta, layer, window, epoch, scale=scale, soft_cap=soft_cap)

    return call


class Slots:
    """Runs attention over slots, and keeps every K and V written as the reference needs them."""

    def __init__(self, kv, *, q_heads, kv_heads, head_dim, dtype, window=0, soft_cap=0.0):
        self.kv, self.window, self.soft_cap = kv, window, soft_cap
        self.shape = (q_heads, kv_heads, head_dim)
        self.dtype = DTYPES[dtype]
        self.call = attention_call(soft_cap)
        self.history: dict[int, list] = {}
        self.epoch = jnp.zeros(1, jnp.int32)

    def step(self, rng, spans, rows, *, qkv=None, layer=1):
        """spans: (slot, count). Returns the output rows and the float64 reference."""
        q_heads, kv_heads, head_dim = self.shape
        count = sum(n for _, n in spans)
        if qkv is None:
            qkv = [
                rng.standard_normal((rows, heads, head_dim)).astype(self.dtype)
                for heads in (q_heads, kv_heads, kv_heads)
            ]
        q, k, v = qkv
        layout = StepLayout(StepShape(rows, 8), self.kv.layout.num_slots)
        described, expected, row = [], [], 0
        for slot, n in spans:
            past = self.history.setdefault(slot, [])
            described.append(Span(slot, len(past), [0] * n, True))
            self.kv.extend([slot], [len(past) + n])
            for i in range(row, row + n):
                past.append((k[i].astype(np.float64), v[i].astype(np.float64)))
                expected.append(self.reference(q[i].astype(np.float64), past))
            row += n
        meta = layout.pack(self.kv.id, described)
        out, self.epoch = self.call(
            q, k, v, meta, np.int32(layer), np.int32(self.window), self.epoch
        )
        return np.asarray(out)[:count], np.array(expected), np.asarray(out)[count:]

    def reference(self, q, past):
        q_heads, kv_heads, head_dim = self.shape
        seen = past[-self.window :] if self.window else past
        keys = np.stack([k for k, _ in seen])
        values = np.stack([v for _, v in seen])
        out = np.empty((q_heads, head_dim))
        for h in range(q_heads):
            g = h // (q_heads // kv_heads)
            scores = keys[:, g] @ q[h] * head_dim**-0.5
            if self.soft_cap:
                scores = self.soft_cap * np.tanh(scores / self.soft_cap)
            weights = np.exp(scores - scores.max())
            out[h] = weights / weights.sum() @ values[:, g]
        return out


def relative_error(got, want):
    return np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "head_dim"), [(4, 2, 64), (3, 3, 80), (8, 1, 128), (6, 2, 40)]
)
@pytest.mark.parametrize(("window", "soft_cap"), [(0, 0.0), (17, 0.0), (0, 5.0)])
def test_attention_of_a_ragged_batch(dtype, q_heads, kv_heads, head_dim, window, soft_cap):
    seed = 7
    rng = np.random.default_rng(seed)
    kv = make_kv(kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    slots = Slots(
        kv,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        window=window,
        soft_cap=soft_cap,
    )
    a, b, c = (kv.take_slot(1) for _ in range(3))
    tolerance = 2e-6 if dtype == "float32" else 6e-3
    for spans in (
        [(a, 70), (b, 3)],
        [(a, 1), (c, 41), (b, 1)],
        [(b, 65), (a, 1)],
        [(a, 1), (b, 1)],
    ):
        got, want, padding = slots.step(rng, spans, 80)
        assert relative_error(got, want) < tolerance, f"seed {seed}, {spans}"
        assert not padding.astype(np.float32).any()


def test_attention_over_many_parts_of_a_long_context():
    seed = 11
    rng = np.random.default_rng(seed)
    kv = make_kv(layers=2, kv_heads=1, head_dim=64)
    slots = Slots(kv, q_heads=2, kv_heads=1, head_dim=64, dtype="float32")
    slot = kv.take_slot(1)
    for _ in range(5):
        got, want, _ = slots.step(rng, [(slot, 512)], 512)
        assert relative_error(got, want) < 2e-6, f"seed {seed}"
    got, want, _ = slots.step(rng, [(slot, 1)], 8)
    assert relative_error(got, want) < 2e-6, f"seed {seed}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_is_the_same_to_the_bit_in_any_batch_and_any_chunking(dtype):
    seed = 3
    rng = np.random.default_rng(seed)
    tokens, heads, kv_heads, dim = 1300, 4, 2, 64
    q, k, v = (
        rng.standard_normal((tokens, h, dim)).astype(DTYPES[dtype])
        for h in (heads, kv_heads, kv_heads)
    )

    def run(chunks, companion):
        kv = make_kv(layers=1, kv_heads=kv_heads, head_dim=dim, dtype=dtype)
        slots = Slots(kv, q_heads=heads, kv_heads=kv_heads, head_dim=dim, dtype=dtype)
        slots.reference = lambda q, past: 0.0
        slot, other = kv.take_slot(1), kv.take_slot(1)
        outputs, at = [], 0
        for count in chunks:
            spans = [(slot, count)]
            rows = [x[at : at + count] for x in (q, k, v)]
            if companion:
                noise = [rng.standard_normal((5, *x.shape[1:])).astype(x.dtype) for x in (q, k, v)]
                spans = [(other, 5), (slot, count)]
                rows = [np.concatenate(pair) for pair in zip(noise, rows, strict=True)]
            out, _, _ = slots.step(rng, spans, len(rows[0]), qkv=rows, layer=0)
            outputs.append(out[-count:])
            at += count
        return np.concatenate(outputs)

    whole = run([tokens], companion=False)
    for chunks in ([1, 2, 300, 512, 1, 484], [1299, 1], [512] * 2 + [1] * 20 + [256]):
        for companion in (False, True):
            np.testing.assert_array_equal(
                run(chunks, companion).view(np.uint8), whole.view(np.uint8), f"{chunks} {seed}"
            )


def test_attention_past_the_mapped_tokens_is_an_error_that_says_so():
    kv = make_kv()
    slot = kv.take_slot(1)
    kv.extend([slot], [5])
    mapped = kv.mapped_tokens(slot)
    meta = StepLayout(StepShape(8, 8), 4).pack(kv.id, [Span(slot, mapped - 2, [0] * 5, True)])
    q = np.ones((8, 4, 64), np.float32)
    k = np.ones((8, 2, 64), np.float32)
    call = attention_call(0.0)
    epoch = jnp.zeros(1, jnp.int32)
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        jax.block_until_ready(call(q, k, k, meta, np.int32(0), np.int32(0), epoch))
    message = str(error.value)
    assert f"slot {slot} " in message
    assert f"{mapped - 2} to {mapped + 3}" in message
    assert f"only {mapped} tokens are mapped" in message
    # The next step works.
    meta = StepLayout(StepShape(8, 8), 4).pack(kv.id, [Span(slot, 0, [0] * 5, True)])
    out, _ = call(q, k, k, meta, np.int32(0), np.int32(0), jnp.zeros(1, jnp.int32))
    np.testing.assert_allclose(np.asarray(out)[:5], 1.0, rtol=1e-6)


@pytest.mark.parametrize(
    "span", [Span(-1, 0, [0], True), Span(9, 0, [0], True), Span(0, -1, [0], True)]
)
def test_attention_refuses_metadata_that_makes_no_sense(span):
    kv = make_kv()
    kv.extend([kv.take_slot(1)], [64])
    meta = StepLayout(StepShape(8, 8), 4).pack(kv.id, [span])
    k = np.ones((8, 2, 64), np.float32)
    with pytest.raises(jax.errors.JaxRuntimeError, match="ellm_attention"):
        jax.block_until_ready(
            attention_call(0.0)(k, k, k, meta, np.int32(0), np.int32(0), jnp.zeros(1, jnp.int32))
        )


@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("out_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 7, 33), (3, 200, 64), (9, 130, 80), (70, 96, 48)])
def test_linear(x_dtype, out_dtype, rows, n, k):
    rng = np.random.default_rng(rows * n + k)
    x = rng.standard_normal((rows + 2, k)).astype(DTYPES[x_dtype])
    w = rng.standard_normal((3, n, k)).astype(DTYPES[x_dtype])
    out = jax.jit(lambda x, w, layer, used: ops.linear(x, w, layer, used, out_dtype))(
        x, w, np.int32(2), np.array([rows], np.int32)
    )
    out = np.asarray(out)
    want = x[:rows].astype(np.float64) @ w[2].astype(np.float64).T
    tolerance = 1e-6 if out_dtype == "float32" else 4e-3
    assert relative_error(out[:rows], want) < tolerance
    assert not out[rows:].astype(np.float32).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_rows_are_the_same_to_the_bit_in_any_batch(dtype):
    rng = np.random.default_rng(5)
    x = rng.standard_normal((37, 96)).astype(DTYPES[dtype])
    w = rng.standard_normal((1, 131, 96)).astype(DTYPES[dtype])

    def run(rows):
        used = np.array([len(rows)], np.int32)
        return np.asarray(ops.linear(rows, w, jnp.int32(0), used, dtype))

    whole = run(x)
    for begin in range(37):
        for count in (1, 2, 3, 5, 8):
            part = run(x[begin : begin + count])
            np.testing.assert_array_equal(part, whole[begin : begin + count])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(5, 64), (3, 7, 80), (40, 33), (1, 1)])
def test_rms_norm(dtype, shape):
    rng = np.random.default_rng(shape[-1])
    x = rng.standard_normal((shape[0] + 2, *shape[1:])).astype(DTYPES[dtype])
    scale = rng.standard_normal(shape[-1]).astype(DTYPES[dtype])
    used = np.array([shape[0]], np.int32)
    out = np.asarray(jax.jit(lambda *a: ops.rms_norm(*a, 1e-5))(x, scale, used))
    wide = x[: shape[0]].astype(np.float64)
    mean_square = np.square(wide).mean(axis=-1, keepdims=True)
    want = wide / np.sqrt(mean_square + 1e-5) * scale.astype(np.float64)
    assert relative_error(out[: shape[0]], want) < (1e-6 if dtype == "float32" else 4e-3)
    assert not out[shape[0] :].astype(np.float32).any()


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("rows", "num_heads", "num_kv_heads", "dim"),
    [(5, 4, 2, 64), (70, 12, 4, 64), (3, 2, 1, 24), (1, 1, 1, 2), (9, 3, 3, 80), (2, 2, 2, 1024)],
)
def test_heads(dtype, rows, num_heads, num_kv_heads, dim, normed):
    rng = np.random.default_rng([rows, dim])
    tokens, counts = rows + 2, (num_heads, num_kv_heads, num_kv_heads)
    qkv = rng.standard_normal((tokens, sum(counts) * dim)).astype(DTYPES[dtype])
    angles = rng.uniform(-9, 9, (tokens, dim // 2))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    scales = [rng.standard_normal(dim).astype(DTYPES[dtype]) for _ in range(2)]
    norms = HeadNorms(*scales, 1e-5) if normed else None
    used = np.array([rows], np.int32)

    def run(*arrays):
        return ops.heads(*arrays, used, num_kv_heads, norms)

    got = [np.asarray(each) for each in jax.jit(run)(qkv, cos, sin)]
    parts = np.split(qkv.reshape(tokens, -1, dim), np.cumsum(counts)[:2], axis=1)
    for index, (out, heads) in enumerate(zip(got, parts, strict=True)):
        assert out.shape == heads.shape
        assert not out[rows:].astype(np.float32).any()
        wide = heads[:rows].astype(np.float64)
        if index == 2:
            np.testing.assert_array_equal(out[:rows], heads[:rows])
            continue
        if normed:
            mean_square = np.square(wide).mean(axis=-1, keepdims=True)
            wide = wide / np.sqrt(mean_square + 1e-5) * scales[index].astype(np.float64)
        first, second = np.split(wide, 2, axis=-1)
        c, s = (each[:rows, None].astype(np.float64) for each in (cos, sin))
        want = np.concatenate([first * c - second * s, second * c + first * s], axis=-1)
        # What is normalised is rounded before it is turned.
        assert relative_error(out[:rows], want) < (1e-6 if dtype == "float32" else 8e-3)


def test_heads_that_do_not_fit():
    def run(width, dim, norm=0):
        norms = HeadNorms(np.zeros(norm, np.float32), np.zeros(norm, np.float32), 0.0)
        turn = np.zeros((3, dim // 2), np.float32)
        qkv = np.zeros((3, width), np.float32)
        return ops.heads(qkv, turn, turn, np.array([3], np.int32), 1, norms)

    assert run(4 * 8, 8)[0].shape == (3, 2, 8)
    for wrong in (dict(width=4 * 8 + 1, dim=8), dict(width=32, dim=8, norm=7)):
        with pytest.raises(jax.errors.JaxRuntimeError, match="do not fit"):
            run(**wrong)
    with pytest.raises(jax.errors.JaxRuntimeError, match="there may be 1024"):
        run(4 * 2048, 2048)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "n"), [(5, 64), (40, 33), (1, 1)])
def test_silu_mul(dtype, rows, n):
    rng = np.random.default_rng(n)
    x = (4 * rng.standard_normal((rows + 2, 2 * n))).astype(DTYPES[dtype])
    x[0, 0] = -200.0 if n > 1 else 3.0
    used = np.array([rows], np.int32)
    out = np.asarray(jax.jit(ops.silu_mul)(x, used))
    gate, up = np.split(x[:rows].astype(np.float64), 2, axis=-1)
    want = gate / (1 + np.exp(-gate)) * up
    assert relative_error(out[:rows], want) < (1e-6 if dtype == "float32" else 4e-3)
    assert not out[rows:].astype(np.float32).any()


@pytest.mark.parametrize("vocab", [1, 15, 16, 33, 4096, 32001])
def test_likeliest(vocab):
    rng = np.random.default_rng(vocab)
    scores = rng.standard_normal((40, vocab)).astype(np.float32)
    scores[1] = -np.inf
    scores[2, vocab // 2 :] = 7.0
    scores[3] = np.where(np.arange(vocab) % 2, 0.0, -0.0)
    scores[4, vocab - 1] = np.inf
    scores[5] = -(scores[5] ** 2)
    used = np.array([38], np.int32)
    got = np.asarray(jax.jit(ops.likeliest)(scores, used))
    np.testing.assert_array_equal(got[:38], scores[:38].argmax(axis=1))
    assert not got[38:].any()


@pytest.mark.parametrize("at", [0, 5, 16, 99])
def test_there_is_no_likeliest_where_a_score_is_nan(at):
    scores = np.zeros((3, 100), np.float32)
    scores[1, at] = np.nan
    assert ops.likeliest(scores, np.array([3], np.int32)).tolist() == [0, -1, 0]


@pytest.mark.parametrize("operation", ["rms_norm", "silu_mul", "heads"])
def test_row_operations_are_the_same_to_the_bit_in_any_batch(operation):
    """What XLA does not promise, and why these are native."""
    rng = np.random.default_rng(9)
    x = rng.standard_normal((64, 100)).astype(np.float32)
    scale = rng.standard_normal(100).astype(np.float32)

    def run(rows):
        used = np.array([len(rows)], np.int32)
        if operation == "rms_norm":
            return np.asarray(ops.rms_norm(rows, scale, used, 1e-5))
        if operation == "heads":
            turn = np.full((len(rows), 10), 0.3, np.float32)
            norms = HeadNorms(scale[:20], scale[20:40], 1e-5)
            return np.asarray(ops.heads(rows, turn, turn, used, 1, norms)[0])
        return np.asarray(ops.silu_mul(rows, used))

    whole = run(x)
    for count in (1, 3, 4, 16, 31):
        np.testing.assert_array_equal(run(x[8 : 8 + count]), whole[8 : 8 + count])
