"""Attention over KV slots of a device, and the same in float64."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from ellm_jax import _native as native
from ellm_jax.runtime import cuda_ops, ops
from ellm_jax.runtime.batch import Span, StepLayout
from ellm_jax.runtime.shapes import StepShape

DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
}
LAYERS = 2


@dataclass(frozen=True)
class Shape:
    """Of the heads, and what a query sees."""

    dtype: str = "bfloat16"
    kv_heads: int = 2
    group: int = 4
    head_dim: int = 128
    window: int = 0
    soft_cap: float = 0.0

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


class DeviceSlots:
    """Slots on a device ("cuda" or "cpu"), and every token that was written to them. Before, their
    memory is NaN."""

    def __init__(self, device: str, shape: Shape, *, max_tokens: int = 4096, slots: int = 8):
        self.shape = shape
        name = "cuda:0" if device == "cuda" else device
        itemsize = np.dtype(DTYPES[shape.dtype]).itemsize
        layout = native.KvLayout.choose(
            LAYERS,
            shape.kv_heads,
            shape.head_dim,
            itemsize,
            max_tokens,
            slots,
            granularity_bytes=native.granularity_bytes(name),
        )
        chunks = -(-max_tokens // layout.tile_tokens) * slots
        self.pool = native.Pool(layout.chunk_bytes, chunks * layout.chunk_bytes, device=name)
        self.kv = native.KvCache(self.pool, layout)
        self._copier = native.Copier(name)
        self._poison = native.HostBuffer(layout.chunk_bytes, layout.chunk_bytes, name)
        (self._poisoned,) = self._poison.take(1)
        ctypes.memset(self._poison.address(self._poisoned), 0xFF, layout.chunk_bytes)
        self.history: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        self.epoch = jnp.zeros(1, jnp.int32)
        if device == "cuda":
            cuda_ops.register()
            attention = partial(cuda_ops.attention, kv_id=self.kv.id, max_tokens=max_tokens)
        else:
            ops.register()
            attention = ops.attention
        self._attention = partial(attention, scale=shape.scale, soft_cap=shape.soft_cap)
        self._on_cuda = device == "cuda"
        self._max_tokens = max_tokens
        self._calls: dict[int, Any] = {}

    def close(self) -> None:
        """Gives everything back; the steps are over."""
        jax.block_until_ready(self.epoch)
        self._copier.close()
        self.kv.close()

    def tokens(self, slot: int, layer: int = 1) -> int:
        """Written to a layer of a slot."""
        return len(self.history[layer, slot][0]) if (layer, slot) in self.history else 0

    def random(self, rng: np.random.Generator, rows: int) -> list[np.ndarray]:
        """q, k and v of so many tokens."""
        shape = self.shape
        heads = (shape.kv_heads * shape.group, shape.kv_heads, shape.kv_heads)
        return [
            rng.standard_normal((rows, h, shape.head_dim), np.float32).astype(DTYPES[shape.dtype])
            for h in heads
        ]

    def step(
        self,
        spans: Sequence[tuple[int, int]],
        qkv: Sequence[np.ndarray],
        *,
        rows: int | None = None,
        sequences: int = 8,
        layer: int = 1,
        checked: bool = True,
    ) -> np.ndarray:
        """Runs (slot, tokens) after what the layer of the slots holds; returns all rows of the
        bucket, which has more than asked for where a prompt needs them. The result memory is NaN
        before. Not `checked`, the step runs as it is."""
        used = len(qkv[0])
        rows = used if rows is None else rows
        if checked and used > len(spans):
            rows = max(rows, sequences + 1)
        padded = [np.concatenate([x, np.ones((rows - used, *x.shape[1:]), x.dtype)]) for x in qkv]
        described, at = [], 0
        for slot, count in spans:
            past = self.tokens(slot, layer)
            described.append(Span(slot, past, [0] * count, True))
            self._map(slot, past + count)
            new = tuple(x[at : at + count] for x in qkv[1:])
            old = self.history.get((layer, slot), tuple(x[:0] for x in qkv[1:]))
            pairs = zip(old, new, strict=True)
            self.history[layer, slot] = tuple(np.concatenate(pair) for pair in pairs)  # type: ignore[assignment]
            at += count
        assert at == used
        layout = StepLayout(StepShape(rows, sequences), self.kv.layout.num_slots)
        meta = layout.pack(self.kv.id, described)
        if checked:
            cuda_ops.check_step(self.kv, meta)
        self._load_kernels(rows, sequences)
        poison = jnp.full(padded[0].shape, np.nan, padded[0].dtype)
        out, self.epoch = self._call(sequences)(
            poison, *padded, meta, np.int32(layer), np.int32(self.shape.window), self.epoch
        )
        return np.asarray(out)

    def _map(self, slot: int, tokens: int) -> None:
        """Maps a slot so far, and fills what is new with NaN."""
        if all(self.tokens(slot, layer) == 0 for layer in range(LAYERS)):
            self.kv.take(slot)
        tile = self.kv.layout.tile_tokens
        before = -(-self.kv.mapped_tokens(slot) // tile)
        if tokens <= self.kv.mapped_tokens(slot):
            return
        self.kv.extend([slot], [tokens])
        for chunk in range(before, -(-tokens // tile)):
            copy = self._copier.fetch(self.kv, slot, chunk, self._poison, [self._poisoned])
            self._copier.wait(copy)

    def _load_kernels(self, rows: int, sequences: int) -> None:
        """Before a step is compiled, as an engine does; nothing on a CPU."""
        if self._on_cuda:
            cuda_ops.load_kernels(
                [0],
                DTYPES[self.shape.dtype],
                rows=rows,
                sequences=sequences,
                q_heads=self.shape.kv_heads * self.shape.group,
                kv_heads=self.shape.kv_heads,
                head_dim=self.shape.head_dim,
                max_tokens=self._max_tokens,
            )

    def _call(self, sequences: int) -> Any:
        if sequences not in self._calls:
            attention = self._attention
            if self._on_cuda:
                attention = partial(attention, sequences=sequences)

            def call(poison: jax.Array, *operands: jax.Array) -> tuple[jax.Array, jax.Array]:
                return attention(*operands)

            # The result takes the memory of the donated NaNs.
            self._calls[sequences] = jax.jit(call, donate_argnums=0, keep_unused=True)
        return self._calls[sequences]

    def reference(self, slot: int, position: int, q: np.ndarray, layer: int = 1) -> np.ndarray:
        """The row of one token ([Hq, D] in, float64 out)."""
        shape = self.shape
        keys, values = (x[: position + 1].astype(np.float64) for x in self.history[layer, slot])
        if shape.window:
            keys, values = keys[-shape.window :], values[-shape.window :]
        grouped = q.astype(np.float64).reshape(shape.kv_heads, shape.group, shape.head_dim)
        scores = np.einsum("hgd,thd->hgt", grouped, keys) * shape.scale
        if shape.soft_cap:
            scores = shape.soft_cap * np.tanh(scores / shape.soft_cap)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        return np.einsum("hgt,thd->hgd", weights, values).reshape(q.shape)


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """By norm, of all rows together; NaN where there is one."""
    return float(np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want))
