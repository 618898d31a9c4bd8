"""The custom calls of the native library as typed JAX functions."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ellm_jax import _native

if TYPE_CHECKING:
    from ellm_jax.models.ops import Finish, HeadNorms


@functools.cache
def register() -> None:
    """Makes the native handlers known to XLA. Has to precede the first lookup of a compiled step
    in the persistent cache; calling it again does nothing."""
    for name, handler in _native.ffi_registrations().items():
        jax.ffi.register_ffi_target(name, handler, platform="cpu")


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    meta: jax.Array,
    layer: jax.Array,
    window: jax.Array,
    epoch: jax.Array,
    *,
    scale: float,
    soft_cap: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Writes k and v of a ragged batch into the KV slots and attends to what the slots hold.

    The order among calls that touch the memory is that of the epoch, and only that: pass the epoch
    of the call before. What follows from the result or the epoch keeps the call; it is not marked
    as one with side effects, because JAX calls programs with such through Python, a millisecond
    each.

    Args:
        q: `[T, Hq, D]`, float32 or bfloat16 like k, v and the memory.
        k: `[T, Hkv, D]`.
        v: `[T, Hkv, D]`.
        meta: `i32[M]`, a packed step (`StepLayout`): which rows belong to which slot.
        layer: `i32[]`.
        window: `i32[]`, how many tokens a query sees, itself included; 0 sees all.
        epoch: `i32[1]`.
        scale: multiplies q . k.
        soft_cap: scores become `soft_cap * tanh(score / soft_cap)`; 0 leaves them.

    Returns:
        `[T, Hq, D]` like q, rows past the batch zero; and the next epoch.

    Raises:
        jax.errors.JaxRuntimeError: when the step runs, if a slot is not mapped far enough (the
            message names slot, tokens and mapped length) or the metadata contradicts the shapes.
    """
    call = jax.ffi.ffi_call(
        "ellm_attention",
        (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((1,), jnp.int32)),
        input_output_aliases={5: 1},
    )
    out, epoch = call(
        q,
        k,
        v,
        meta,
        jnp.stack([layer, window]),
        epoch,
        scale=np.float32(scale),
        soft_cap=np.float32(soft_cap),
    )
    return out, epoch


def linear(
    x: jax.Array,
    weight: jax.Array,
    layer: jax.Array,
    rows: jax.Array,
    out_dtype: DTypeLike,
    *,
    panels: bool = False,
    finish: Finish | None = None,
) -> jax.Array:
    """`x[:rows] @ weight[layer].T`, accumulated in float32; each row in an order of its own.

    Args:
        x: `[T, K]`.
        weight: `[L, N, K]`; only the layer asked for is read, and nothing is copied.
        layer: `i32[]`.
        rows: `i32[1]`, rows in use.
        out_dtype: float32 or bfloat16.
        panels: the weight is bfloat16 and each layer of it in panels, as `Format` says.
        finish: see `ModelOps.linear`.

    Returns:
        `[T, N]`, or what `finish` makes of it, zero past `rows`.
    """
    bias, add, gated = _finish_operands(x, finish)
    outputs = weight.shape[1] // 2 if gated else weight.shape[1]
    call = jax.ffi.ffi_call("ellm_linear", jax.ShapeDtypeStruct((x.shape[0], outputs), out_dtype))
    out: jax.Array = call(x, weight, bias, add, layer.reshape(1), rows, panels=panels, gated=gated)
    return out


def _finish_operands(x: jax.Array, finish: Finish | None) -> tuple[jax.Array, jax.Array, bool]:
    """Bias and what is added, empty where there is none, and whether the result is gated."""
    none = jnp.zeros((0,), x.dtype)
    if finish is None:
        return none, none, False
    bias, add = (none if operand is None else operand for operand in (finish.bias, finish.add))
    return bias, add, finish.gated


def linear_int8(
    x: jax.Array,
    weight: jax.Array,
    scale: jax.Array,
    layer: jax.Array,
    rows: jax.Array,
    out_dtype: DTypeLike,
    *,
    panels: bool = False,
    finish: Finish | None = None,
) -> jax.Array:
    """`x[:rows] @ (weight[layer] * scale[layer]).T`, the rows quantised to int8 as
    `ModelOps.linear_int8` says; the same bits on every instruction set.

    Args:
        x: `[T, K]`, float32 or bfloat16; K at most 65,536.
        weight: `i8[L, N, K]`; only the layer asked for is read, and nothing is copied.
        scale: `f32[L, N]`.
        layer: `i32[]`.
        rows: `i32[1]`, rows in use.
        out_dtype: float32 or bfloat16.
        panels: each layer of the weight is in panels, as `Format` says; only where
            `_native.int8_panels()`.
        finish: see `ModelOps.linear`.

    Returns:
        `[T, N]`, or what `finish` makes of it, zero past `rows`; NaN in rows of x that are not
        finite.
    """
    bias, add, gated = _finish_operands(x, finish)
    outputs = weight.shape[1] // 2 if gated else weight.shape[1]
    call = jax.ffi.ffi_call(
        "ellm_linear_int8", jax.ShapeDtypeStruct((x.shape[0], outputs), out_dtype)
    )
    out: jax.Array = call(
        x, weight, scale, bias, add, layer.reshape(1), rows, panels=panels, gated=gated
    )
    return out


def linear_int4(
    x: jax.Array,
    weight: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None,
    layer: jax.Array,
    rows: jax.Array,
    outputs: int,
    out_dtype: DTypeLike,
) -> jax.Array:
    """`x[:rows] @ (scale[layer] * (weight[layer] - zero[layer])).T` for weights in 4 bits, as
    `ModelOps.linear_int4` says; each row in an order of its own.

    Args:
        x: `[T, K]`, float32 or bfloat16.
        weight: `u8[L, N / 16, K / group, 8 group]`, group 32 or 128; only the layer asked for is
            read, and nothing is copied.
        scale: `f16[L, N / 16, K / group, 16]`.
        zero: `u8`, like `scale`; None: 8.
        layer: `i32[]`.
        rows: `i32[1]`, rows in use.
        outputs: N.
        out_dtype: float32 or bfloat16.

    Returns:
        `[T, N]`, zero past `rows`; NaN in rows of x that are not finite.
    """
    call = jax.ffi.ffi_call(
        "ellm_linear_int4", jax.ShapeDtypeStruct((x.shape[0], outputs), out_dtype)
    )
    zeros = jnp.zeros((0,), jnp.uint8) if zero is None else zero
    out: jax.Array = call(x, weight, scale, zeros, layer.reshape(1), rows)
    return out


def rms_norm(x: jax.Array, scale: jax.Array, rows: jax.Array, eps: float) -> jax.Array:
    """Divides the last axis by its root mean square and multiplies by `scale`, in float32.

    Args:
        x: `[T, N]` or `[T, heads, N]`.
        scale: `[N]`, in the dtype of x.
        rows: `i32[1]`, tokens in use; the rest of the result is zero.
        eps: added to the mean square.
    """
    call = jax.ffi.ffi_call("ellm_rms_norm", jax.ShapeDtypeStruct(x.shape, x.dtype))
    out: jax.Array = call(x, scale, rows, eps=np.float32(eps))
    return out


def heads(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    rows: jax.Array,
    num_kv_heads: int,
    norms: HeadNorms | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Parts the heads of fused projections, and turns those of q and k, as `ModelOps.heads` says.

    Args:
        qkv: `[T, (Hq + 2 Hkv) D]`, float32 or bfloat16; D at most 1,024.
        cos: `f32[T, D / 2]`.
        sin: `f32[T, D / 2]`.
        rows: `i32[1]`, tokens in use; the rest of the results is zero.
        num_kv_heads: Hkv.
        norms: of q and k before they are turned, or None.

    Returns:
        `[T, Hq, D]`, `[T, Hkv, D]` and `[T, Hkv, D]`.
    """
    tokens, dim = qkv.shape[0], 2 * cos.shape[-1]
    num_heads = qkv.shape[1] // dim - 2 * num_kv_heads
    shapes = [
        jax.ShapeDtypeStruct((tokens, count, dim), qkv.dtype)
        for count in (num_heads, num_kv_heads, num_kv_heads)
    ]
    none = jnp.zeros((0,), qkv.dtype)
    q_norm, k_norm, eps = (none, none, 0.0) if norms is None else norms
    call = jax.ffi.ffi_call("ellm_heads", shapes)
    q, k, v = call(qkv, cos, sin, q_norm, k_norm, rows, eps=np.float32(eps))
    return q, k, v


def silu_mul(gate_up: jax.Array, rows: jax.Array) -> jax.Array:
    """`silu(gate) * up` in float32.

    Args:
        gate_up: `[T, 2 N]`, gate first.
        rows: `i32[1]`, rows in use; the rest of the result is zero.
    """
    shape = (gate_up.shape[0], gate_up.shape[1] // 2)
    call = jax.ffi.ffi_call("ellm_silu_mul", jax.ShapeDtypeStruct(shape, gate_up.dtype))
    out: jax.Array = call(gate_up, rows)
    return out


def likeliest(scores: jax.Array, rows: jax.Array) -> jax.Array:
    """The token with the largest score of each row, the lowest among equals; -1 where one is NaN.

    Args:
        scores: `f32[S, V]`.
        rows: `i32[1]`, rows in use; the rest of the result is zero.

    Returns:
        `i32[S]`.
    """
    call = jax.ffi.ffi_call("ellm_likeliest", jax.ShapeDtypeStruct((scores.shape[0],), np.int32))
    out: jax.Array = call(scores, rows)
    return out


def pool_threads() -> int:
    """Threads of the pool that XLA's CPU backend and these operations share. Takes some ten
    milliseconds: it runs a program that asks."""
    call = jax.ffi.ffi_call("ellm_pool_threads", jax.ShapeDtypeStruct((1,), np.int32))
    with jax.default_device(jax.devices("cpu")[0]):
        return int(jax.jit(call)()[0])


class NativeOps:
    """`ModelOps` over the custom calls, for one packed step."""

    def __init__(self, meta: jax.Array, rows: jax.Array):
        """Takes the packed step (`i32[M]`) and its token rows in use (`i32[1]`)."""
        self._meta = meta
        self._rows = rows

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
        """See `ModelOps.linear`; rows past those in use are zero."""
        dtype = x.dtype if out_dtype is None else out_dtype
        return linear(x, weight, layer, self._rows, dtype, panels=panels, finish=finish)

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
        """See `ModelOps.linear_int8`; rows past those in use are zero."""
        dtype = x.dtype if out_dtype is None else out_dtype
        return linear_int8(x, weight, scale, layer, self._rows, dtype, panels=panels, finish=finish)

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
        """See `ModelOps.linear_int4`; rows past those in use are zero."""
        dtype = x.dtype if out_dtype is None else out_dtype
        return linear_int4(x, weight, scale, zero, layer, self._rows, outputs, dtype)

    def rms_norm(self, x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
        """See `ModelOps.rms_norm`."""
        return rms_norm(x, scale, self._rows, eps)

    def heads(
        self,
        qkv: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        num_kv_heads: int,
        norms: HeadNorms | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """See `ModelOps.heads`; rows past those in use are zero."""
        return heads(qkv, cos, sin, self._rows, num_kv_heads, norms)

    def silu_mul(self, gate_up: jax.Array) -> jax.Array:
        """See `ModelOps.silu_mul`."""
        return silu_mul(gate_up, self._rows)

    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        layer: jax.Array,
        window: jax.Array,
        cache: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """See `ModelOps.attend`; the cache is the epoch (`i32[1]`)."""
        scale = q.shape[-1] ** -0.5
        return attention(q, k, v, self._meta, layer, window, cache, scale=scale)
