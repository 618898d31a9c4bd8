"""How fast the CUDA attention kernels are, beside what the same GPU does at its best: decoding
beside a copy, prefill beside a matrix product."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ellm_jax._native import KvCache, KvLayout, Pool, granularity_bytes
from ellm_jax.runtime import cuda_ops
from ellm_jax.runtime.batch import Span, StepLayout
from ellm_jax.runtime.shapes import StepShape

DECODE_CONTEXTS = {8: (2048, 4096, 8192, 16384, 32768), 32: (2048, 4096, 8192)}
"""By layers of the KV memory. Calls go through them in turn and find none of it in the cache. With
8 a chunk is full of tokens; with 32, as many as Llama-3-8B has, a call finds a quarter as many
tokens behind each other, in four times as many pages. Longer contexts would not fit an H100."""
PREFILL_TOKENS = (8192, 16384, 32768)
DECODE_BAR, PREFILL_BAR = 0.8, 0.6
"""Least shares of the copy bandwidth and of the matrix rate."""

_PREFILL_LAYERS = 8


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
        layers: of the KV memory.
        seconds: of one call.
        per_second: bytes of K and V read, or operations.
    """

    tokens: int
    layers: int
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

    state = jnp.ones(bytes // 4, jnp.uint32)
    return 2 * bytes / _seconds_per_call(body, state)


def matrix_rate(size: int = 8192) -> float:
    """Operations per second of a bfloat16 matrix product, accumulated in float32."""
    rng = np.random.default_rng(0)
    scaled = rng.standard_normal((size, size), np.float32) / np.sqrt(size)
    factor = jnp.asarray(scaled, jnp.bfloat16)

    def body(_: Any, x: jax.Array, factor: jax.Array) -> jax.Array:
        return jnp.dot(x, factor, preferred_element_type=jnp.bfloat16)

    return 2 * size**3 / _seconds_per_call(body, factor, (factor,))


def decode_rate(
    context_tokens: int, layers: int, batch: int = 32, heads: Heads | None = None
) -> Rate:
    """Decoding one token for each of `batch` sequences, over bfloat16 KV."""
    heads = heads or Heads()
    with _Slots(heads, layers, context_tokens, batch) as slots:
        spans = [Span(slot, context_tokens - 1, [0], True) for slot in range(batch)]
        seconds = slots.seconds_per_call(spans, StepShape(batch, batch))
    read_bytes = batch * context_tokens * 2 * heads.kv * heads.dim * 2
    return Rate(context_tokens, layers, seconds, read_bytes / seconds)


def prefill_rate(tokens: int, heads: Heads | None = None) -> Rate:
    """The prefill of one prompt, in one step."""
    heads = heads or Heads()
    with _Slots(heads, _PREFILL_LAYERS, tokens, 1) as slots:
        seconds = slots.seconds_per_call([Span(0, 0, [0] * tokens, True)], StepShape(tokens, 1))
    # Two products of 2 operations for each query head, element, and pair of tokens that see each
    # other: half of all pairs.
    operations = 2 * 2 * heads.query * heads.dim * tokens**2 / 2
    return Rate(tokens, _PREFILL_LAYERS, seconds, operations / seconds)


def measure(findings: Findings) -> None:
    """Measures everything, each beside its yardstick. One that fails does not hide the others.

    Raises:
        RuntimeError: some could not be measured.
    """
    copied = copy_rate()
    findings.data["copy_bytes_per_second"] = copied
    findings.add("copy bandwidth", f"{copied / 1e9:,.0f} GB/s")
    multiplied = matrix_rate()
    findings.data["matrix_operations_per_second"] = multiplied
    findings.add("bf16 matrix product", f"{multiplied / 1e12:,.0f} TFLOP/s")

    failed: list[str] = []

    def share(kind: str, what: str, rate_of: Callable[[], Rate], best: float, bar: float) -> None:
        try:
            rate = rate_of()
        except Exception as error:
            findings.add(what, f"not measured: {error}")
            failed.append(f"{what}: {error}")
            return
        findings.data.setdefault(kind, []).append(asdict(rate))
        unit, name = (1e9, "GB/s") if kind == "decode" else (1e12, "TFLOP/s")
        row = f"{what}: {rate.per_second / unit:,.0f} {name}"
        findings.add_share(row, rate.per_second / best, bar)

    for layers, contexts in DECODE_CONTEXTS.items():
        for context in contexts:
            what = f"decode attention, batch 32 at {context:,}, {layers} layers"
            share("decode", what, partial(decode_rate, context, layers), copied, DECODE_BAR)
    for tokens in PREFILL_TOKENS:
        what = f"prefill attention of {tokens:,}"
        share("prefill", what, partial(prefill_rate, tokens), multiplied, PREFILL_BAR)
    if failed:
        raise RuntimeError("not measured: " + "; ".join(failed))


class _Slots:
    """KV slots on the first GPU, mapped to the end, and attention over them."""

    def __init__(self, heads: Heads, layers: int, max_tokens: int, slots: int):
        cuda_ops.register()
        device = "cuda:0"
        layout = KvLayout.choose(
            layers,
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
        layers, max_tokens = self._kv.layout.layers, self._kv.layout.max_tokens
        cuda_ops.load_kernels(
            [0],
            jnp.bfloat16,
            rows=shape.rows,
            sequences=shape.seqs,
            q_heads=self._heads.query,
            kv_heads=self._heads.kv,
            head_dim=self._heads.dim,
            max_tokens=max_tokens,
        )

        def body(
            i: jax.Array,
            carry: tuple[jax.Array, jax.Array],
            q: jax.Array,
            k: jax.Array,
            v: jax.Array,
            meta: jax.Array,
        ) -> tuple[jax.Array, jax.Array]:
            return cuda_ops.attention(
                q,
                k,
                v,
                meta,
                i % layers,
                jnp.int32(0),
                carry[1],
                kv_id=self._kv.id,
                sequences=shape.seqs,
                max_tokens=max_tokens,
                scale=self._heads.dim**-0.5,
            )

        state = (jnp.zeros_like(q), jnp.zeros(1, jnp.int32))
        return _seconds_per_call(body, state, (q, k, v, jnp.asarray(meta)))


def _seconds_per_call(
    body: Callable[..., Any], state: Any, operands: tuple[jax.Array, ...] = ()
) -> float:
    """Of the body of a loop: the difference between many repeats and few, so that what starting
    costs is not in it. The best of several rounds.

    Args:
        body: takes the number of the call, what the loop carries, and the operands; returns what
            the loop carries.
        state: what it carries at first.
        operands: what is the same in every call. Not to be constants of the body, or they would be
            part of the compiled program.
    """

    # A static number of repeats: a loop of unknown length would wait for the device each time.
    @partial(jax.jit, static_argnums=2)
    def calls(state: Any, operands: tuple[jax.Array, ...], repeats: int) -> Any:
        return lax.fori_loop(0, repeats, lambda i, carried: body(i, carried, *operands), state)

    def seconds(repeats: int) -> float:
        begin = time.perf_counter()
        jax.block_until_ready(calls(state, operands, repeats))
        return time.perf_counter() - begin

    few = 4
    seconds(few)  # compiles
    # As many more as take about a quarter of a second.
    more = max(8, min(2000, round(0.25 * few / seconds(few))))
    seconds(few + more)
    rounds = [(seconds(few), seconds(few + more)) for _ in range(4)]
    short, long = (min(times) for times in zip(*rounds, strict=True))
    return float(long - short) / more
