"""How fast the CUDA attention kernels are, beside what the same GPU does at its best: decoding
beside a copy, prefill beside a matrix product."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ellm_jax._native import KvCache, KvLayout, Pool, granularity_bytes
from ellm_jax.runtime import cuda_ops
from ellm_jax.runtime.batch import Span, StepLayout
from ellm_jax.runtime.shapes import StepShape

DECODE_CONTEXTS = (2048, 4096, 8192, 16384, 32768)
PREFILL_TOKENS = (8192, 16384, 32768)
DECODE_BAR, PREFILL_BAR = 0.8, 0.6
"""Least shares of the copy bandwidth and of the matrix rate."""

_KV_LAYERS = 8
"""Layers of the KV memory: with as many a chunk is full of tokens, and calls that go through them
in turn find none of it in the cache."""


@dataclass(frozen=True)
class Heads:
    """The heads that are measured: those of Llama-3-8B."""

    kv: int = 8
    group: int = 4
    dim: int = 128

    @property
    def query(self) -> int:
        """Query heads."""
        return self.kv * self.group


@dataclass(frozen=True)
class Rate:
    """One measurement.

    Attributes:
        tokens: of context when decoding, of the prompt in a prefill.
        seconds: of one call.
        per_second: bytes of K and V read, or operations.
    """

    tokens: int
    seconds: float
    per_second: float


class Findings(Protocol):
    """Where `measure` puts what it finds."""

    data: dict[str, Any]

    def add(self, what: str, value: str) -> None:
        """A row of a table."""

    def add_share(self, what: str, value: float, least: float) -> None:
        """A row with a share that is to be at least so much."""


def copy_rate(bytes: int = 4 << 30) -> float:
    """Bytes per second, read and written together, of a copy in device memory."""

    # A negation is a copy that no compiler leaves out, behind a barrier not even two of them.
    def body(_: Any, x: jax.Array) -> jax.Array:
        copied: jax.Array = lax.optimization_barrier(-x)
        return copied

    copy = jax.jit(lambda x, repeats: lax.fori_loop(0, repeats, body, x), static_argnums=1)
    state = jnp.ones(bytes // 4, jnp.uint32)
    seconds = _seconds_per_call(copy, state)
    return 2 * bytes / seconds


def matrix_rate(size: int = 8192) -> float:
    """Operations per second of a bfloat16 matrix product, accumulated in float32."""
    rng = np.random.default_rng(0)
    scaled = rng.standard_normal((size, size), np.float32) / np.sqrt(size)
    factor = jnp.asarray(scaled, jnp.bfloat16)

    def body(_: Any, x: jax.Array) -> jax.Array:
        return jnp.dot(x, factor, preferred_element_type=jnp.bfloat16)

    product = jax.jit(lambda x, repeats: lax.fori_loop(0, repeats, body, x), static_argnums=1)
    return 2 * size**3 / _seconds_per_call(product, factor)


def decode_rate(context_tokens: int, batch: int = 32, heads: Heads | None = None) -> Rate:
    """Decoding one token for each of `batch` sequences, over bfloat16 KV."""
    heads = heads or Heads()
    with _Slots(heads, context_tokens, batch) as slots:
        spans = [Span(slot, context_tokens - 1, [0], True) for slot in range(batch)]
        seconds = slots.seconds_per_call(spans, StepShape(batch, batch))
    read_bytes = batch * context_tokens * 2 * heads.kv * heads.dim * 2
    return Rate(context_tokens, seconds, read_bytes / seconds)


def prefill_rate(tokens: int, heads: Heads | None = None) -> Rate:
    """The prefill of one prompt, in one step."""
    heads = heads or Heads()
    with _Slots(heads, tokens, 1) as slots:
        seconds = slots.seconds_per_call([Span(0, 0, [0] * tokens, True)], StepShape(tokens, 1))
    # Two products of 2 operations for each query head, element, and pair of tokens that see each
    # other: half of all pairs.
    operations = 2 * 2 * heads.query * heads.dim * tokens**2 / 2
    return Rate(tokens, seconds, operations / seconds)


def measure(findings: Findings) -> None:
    """Measures everything, each beside its yardstick."""
    copied = copy_rate()
    findings.data["copy_bytes_per_second"] = copied
    findings.add("copy bandwidth", f"{copied / 1e9:,.0f} GB/s")
    for context in DECODE_CONTEXTS:
        rate = decode_rate(context)
        findings.data.setdefault("decode", []).append(asdict(rate))
        what = f"decode attention, batch 32 at {context:,}: {rate.per_second / 1e9:,.0f} GB/s"
        findings.add_share(what, rate.per_second / copied, DECODE_BAR)
    multiplied = matrix_rate()
    findings.data["matrix_operations_per_second"] = multiplied
    findings.add("bf16 matrix product", f"{multiplied / 1e12:,.0f} TFLOP/s")
    for tokens in PREFILL_TOKENS:
        rate = prefill_rate(tokens)
        findings.data.setdefault("prefill", []).append(asdict(rate))
        what = f"prefill attention of {tokens:,}: {rate.per_second / 1e12:,.0f} TFLOP/s"
        findings.add_share(what, rate.per_second / multiplied, PREFILL_BAR)


class _Slots:
    """KV slots on the first GPU, mapped to the end, and attention over them."""

    def __init__(self, heads: Heads, max_tokens: int, slots: int):
        cuda_ops.register()
        device = "cuda:0"
        layout = KvLayout.choose(
            _KV_LAYERS,
            heads.kv,
            heads.dim,
            2,
            max_tokens,
            slots,
            granularity_bytes=granularity_bytes(device),
        )
        chunks = slots * -(-max_tokens // layout.tile_tokens)
        self._heads = heads
        self._pool = Pool(layout.chunk_bytes, chunks * layout.chunk_bytes, device=device)
        self._kv = KvCache(self._pool, layout)
        taken = [self._kv.take_slot(max_tokens) for _ in range(slots)]
        self._kv.extend(taken, [max_tokens] * slots)

    def __enter__(self) -> _Slots:
        return self

    def __exit__(self, *_: object) -> None:
        self._kv.close()
        self._pool.trim()

    def seconds_per_call(self, spans: list[Span], shape: StepShape) -> float:
        """Of attention over one layer, writing K and V included."""
        layout = StepLayout(shape, self._kv.layout.num_slots)
        meta = layout.pack(self._kv.id, spans)
        self._kv.check_step(meta)
        rng = np.random.default_rng(0)
        q, k, v = (
            jnp.asarray(
                rng.standard_normal((shape.rows, heads, self._heads.dim), np.float32), jnp.bfloat16
            )
            for heads in (self._heads.query, self._heads.kv, self._heads.kv)
        )
        on_device = jnp.asarray(meta)

        def body(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            return cuda_ops.attention(
                q,
                k,
                v,
                on_device,
                i % _KV_LAYERS,
                jnp.int32(0),
                carry[1],
                kv_id=self._kv.id,
                sequences=shape.seqs,
                max_tokens=self._kv.layout.max_tokens,
                scale=self._heads.dim**-0.5,
            )

        calls = jax.jit(lambda x, repeats: lax.fori_loop(0, repeats, body, x), static_argnums=1)
        return _seconds_per_call(calls, (jnp.zeros_like(q), jnp.zeros(1, jnp.int32)))


def _seconds_per_call(calls: Callable[[Any, int], Any], state: Any) -> float:
    """Of the body of a loop: the difference between many repeats and few, so that what starting
    costs is not in it. The best of several rounds.

    Args:
        calls: takes the state and how often the body is to run, a static number: a loop of unknown
            length would wait for the device each time.
        state: whatever the loop carries.
    """

    def seconds(repeats: int) -> float:
        begin = time.perf_counter()
        jax.block_until_ready(calls(state, repeats))
        return time.perf_counter() - begin

    few = 4
    seconds(few)  # compiles
    # As many more as take about a quarter of a second.
    more = max(8, min(2000, round(0.25 * few / seconds(few))))
    seconds(few + more)
    rounds = [(seconds(few), seconds(few + more)) for _ in range(4)]
    short, long = (min(times) for times in zip(*rounds, strict=True))
    return float(long - short) / more
