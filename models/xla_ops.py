"""Plain JAX operations over one whole sequence: for training, and as the reference."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from ellm_jax.models.ops import Finish, HeadNorms
from ellm_jax.models.quantization import WIDE_PANEL_OUTPUTS
from ellm_jax.models.rope import apply_rotation


def _by_row(panels: jax.Array) -> jax.Array:
    """A matrix in panels, `[N, K]`, row by row."""
    outputs, inputs = panels.shape
    together = 4 // panels.dtype.itemsize
    last = outputs // WIDE_PANEL_OUTPUTS * WIDE_PANEL_OUTPUTS

    def rows(part: jax.Array, width: int) -> jax.Array:
        words = part.reshape(-1, inputs // together, width, together)
        return words.swapaxes(1, 2).reshape(-1, inputs)

    parts = [rows(panels[:last], WIDE_PANEL_OUTPUTS)]
    if last < outputs:
        parts.append(rows(panels[last:], outputs - last))
    return jnp.concatenate(parts)


def _finished(y: jax.Array, finish: Finish | None) -> jax.Array:
    if finish is None:
        return y
    if finish.bias is not None:
        y = y + finish.bias
    if finish.add is not None:
        y = y + finish.add
    if finish.gated:
        panels = y.astype(jnp.float32).reshape(y.shape[0], -1, 2, WIDE_PANEL_OUTPUTS // 2)
        gated = jax.nn.silu(panels[:, :, 0]) * panels[:, :, 1]
        y = gated.reshape(y.shape[0], -1).astype(y.dtype)
    return y


class XlaOps:
    """`ModelOps` without a cache: the tokens are one sequence from its start. Differentiable."""

    def linear(
        self,
        x: jax.Array,
        weight: jax.Array,
        layer: jax.Array,
        out_dtype: DTypeLike | None = None,
        *,
        panels: bool = False,
        finish: Finish | None = None,
    ) -> jax.Array:
        """`x @ weight[layer].T` in float32, returned in `out_dtype` or the dtype of x."""
        y = jnp.einsum(
            "tk,nk->tn",
            x,
            _by_row(weight[layer]) if panels else weight[layer],
            precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        ).astype(x.dtype if out_dtype is None else out_dtype)
        return _finished(y, finish)

    def linear_int8(
        self,
        x: jax.Array,
        weight: jax.Array,
        scale: jax.Array,
        layer: jax.Array,
        out_dtype: DTypeLike | None = None,
        *,
        panels: bool = False,
        finish: Finish | None = None,
    ) -> jax.Array:
        """See `ModelOps.linear_int8`. Rows below 1e-30 all over count as zero."""
        wide = x.astype(jnp.float32)
        largest = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
        x_scale = jnp.where(largest < 1e-30, 0, largest / 127)
        steps = jnp.rint(wide / jnp.where(x_scale == 0, 1, x_scale))
        values = jnp.where(x_scale == 0, 0, steps).astype(jnp.int8)
        matrix = _by_row(weight[layer]) if panels else weight[layer]
        sums = jnp.einsum("tk,nk->tn", values, matrix, preferred_element_type=jnp.int32)
        y = sums.astype(jnp.float32) * x_scale * scale[layer]
        return _finished(y.astype(x.dtype if out_dtype is None else out_dtype), finish)

    def linear_int4(
        self,
        x: jax.Array,
        weight: jax.Array,
        scale: jax.Array,
        zero: jax.Array | None,
        layer: jax.Array,
        outputs: int,
        out_dtype: DTypeLike | None = None,
    ) -> jax.Array:
        """See `ModelOps.linear_int4`."""
        panels, groups, eights = weight.shape[1:]
        tokens, inputs = x.shape
        group = eights // 8
        # A panel's bytes run along: eight inputs, output, input of four.
        packed = weight[layer].reshape(panels, groups, group // 8, 16, 4)
        both = jnp.stack([packed & 15, packed >> 4], axis=-2)
        steps = both.transpose(0, 3, 1, 2, 4, 5).reshape(panels * 16, groups, group)

        def by_output(array: jax.Array) -> jax.Array:
            return array[layer].swapaxes(1, 2).reshape(panels * 16, groups)

        shift = 8 if zero is None else by_output(zero).astype(jnp.int32)[..., None]
        padded = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, groups * group - inputs)))
        wide = padded.reshape(tokens, groups, group)
        largest = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
        x_scale = jnp.where(largest < 1e-30, 0, largest / 127)
        values = jnp.where(x_scale == 0, 0, jnp.rint(wide / jnp.where(x_scale == 0, 1, x_scale)))
        sums = jnp.einsum("tgk,ngk->tng", values.astype(jnp.int32), steps.astype(jnp.int32) - shift)
        scales = by_output(scale).astype(jnp.float32) * x_scale.swapaxes(1, 2)
        y = jnp.sum(sums.astype(jnp.float32) * scales, axis=-1)[:, :outputs]
        return y.astype(x.dtype if out_dtype is None else out_dtype)

    def rms_norm(self, x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
        """See `ModelOps.rms_norm`."""
        wide = x.astype(jnp.float32)
        inverse = lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
        return (wide * inverse * scale.astype(jnp.float32)).astype(x.dtype)

    def heads(
        self,
        qkv: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        num_kv_heads: int,
        norms: HeadNorms | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """See `ModelOps.heads`."""
        heads = qkv.reshape(qkv.shape[0], -1, 2 * cos.shape[-1])
        num_heads = heads.shape[1] - 2 * num_kv_heads
        q, k, v = jnp.split(heads, (num_heads, num_heads + num_kv_heads), axis=1)
        if norms is not None:
            q = self.rms_norm(q, norms.q, norms.eps)
            k = self.rms_norm(k, norms.k, norms.eps)
        return apply_rotation(q, cos, sin), apply_rotation(k, cos, sin), v

    def silu_mul(self, gate_up: jax.Array) -> jax.Array:
        """See `ModelOps.silu_mul`."""
        gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
        return (jax.nn.silu(gate) * up).astype(gate_up.dtype)

    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        layer: jax.Array,
        window: jax.Array,
        cache: Any,
    ) -> tuple[jax.Array, Any]:
        """Dense causal attention of `[T, Hq, D]` over `[T, Hkv, D]`; `layer` and cache unused."""
        tokens, heads, head_dim = q.shape
        kv_heads = k.shape[1]
        grouped = q.reshape(tokens, kv_heads, heads // kv_heads, head_dim)
        scores = jnp.einsum(
            "thgd,shd->hgts",
            grouped,
            k,
            precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        distance = jnp.arange(tokens)[:, None] - jnp.arange(tokens)[None, :]
        visible = (distance >= 0) & ((window == 0) | (distance < window))
        weights = jax.nn.softmax(jnp.where(visible, scores * head_dim**-0.5, -jnp.inf), axis=-1)
        mixed = jnp.einsum(
            "hgts,shd->thgd", weights, v.astype(jnp.float32), precision=lax.Precision.HIGHEST
        )
        return mixed.reshape(tokens, heads, head_dim).astype(q.dtype), cache
