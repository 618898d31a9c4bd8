"""What a model asks of the engine: the heavy operations and the reductions, nothing of memory."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
from jax.typing import DTypeLike


class HeadNorms(NamedTuple):
    """How each head of q and k is normalised: as `ModelOps.rms_norm` does with a row.

    Attributes:
        q, k: `[D]`, in the dtype of the heads.
        eps: added to the mean square.
    """

    q: jax.Array
    k: jax.Array
    eps: float


class Finish(NamedTuple):
    """What a linear layer in panels makes of its products `[T, N]` before they are stored, in this
    order, and each rounded to the dtype of the result.

    Attributes:
        bias: `[N]`, added to each row.
        add: `[T, N]`, added.
        gated: the outputs are gates and ups by turns, as `Quantization.by_turns` says; the result
            is `silu(gate) * up`, `[T, N / 2]`. Nothing is added then.
    """

    bias: jax.Array | None = None
    add: jax.Array | None = None
    gated: bool = False


class ModelOps(Protocol):
    """The computations that an engine supplies to a model.

    T is the number of tokens in the step, L of layers, N and K of outputs and inputs, Hq and Hkv of
    query and key-value heads, D the head size. `layer` is an `i32[]`, traced inside a scan, so that
    a custom call may index the stacked weights instead of being given a copied slice.
    """

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
        """`x @ weight[layer].T`, accumulated in float32.

        Args:
            x: `[T, K]`.
            weight: `[L, N, K]`, all layers.
            layer: `i32[]`.
            out_dtype: of the result; None takes that of x.
            panels: the weight is bfloat16 and each layer of it in panels, as `Format` says.
            finish: what comes after the products, or nothing; only with `panels`, and where the
                result is bfloat16.

        Returns:
            `[T, N]`, or what `finish` makes of it.
        """
        ...

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
        """`x @ (weight[layer] * scale[layer]).T`, each row of x quantised to int8 too.

        A row x becomes `x_scale = max |x| / 127` and `q = x / x_scale`, rounded to even. The
        products of int8 are summed exactly, then multiplied in float32 by `x_scale` and by `scale`.

        Args:
            x: `[T, K]`.
            weight: `i8[L, N, K]`, all layers, in [-127, 127].
            scale: `f32[L, N]`.
            layer: `i32[]`.
            out_dtype: of the result; None takes that of x.
            panels: each layer of the weight is in panels, as `Format` says.
            finish: see `linear`.

        Returns:
            `[T, N]`, or what `finish` makes of it.
        """
        ...

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
        """`x @ (scale[layer] * (weight[layer] - zero[layer])).T` for weights in 4 bits, held as
        `Format` says.

        Each group of a row of x is quantised to int8 as `linear_int8` does with a whole row. Within
        a group the products are summed exactly; then the sums are multiplied in float32 by both
        scales, and added.

        Args:
            x: `[T, K]`.
            weight: `u8[L, N / 16, K / group, 8 group]`, all layers.
            scale: `f16[L, N / 16, K / group, 16]`.
            zero: `u8`, like `scale`; None: 8.
            layer: `i32[]`.
            outputs: N.
            out_dtype: of the result; None takes that of x.

        Returns:
            `[T, N]`.
        """
        ...

    def rms_norm(self, x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
        """Divide the last axis by its root mean square and multiply by `scale`, in float32.

        Args:
            x: `[T, N]` or `[T, heads, N]`.
            scale: `[N]`, in the dtype of x.
            eps: added to the mean square.

        Returns:
            As x.
        """
        ...

    def heads(
        self,
        qkv: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        num_kv_heads: int,
        norms: HeadNorms | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Part the heads of fused projections, and turn element i of those of q and k with element
        i + D/2, in float32.

        Args:
            qkv: `[T, (Hq + 2 Hkv) D]`: queries, keys, values.
            cos: `f32[T, D / 2]`; see `rotation`.
            sin: like `cos`.
            num_kv_heads: Hkv.
            norms: of q and k before they are turned; None leaves them.

        Returns:
            `[T, Hq, D]`, `[T, Hkv, D]` and `[T, Hkv, D]`, in the dtype of qkv.
        """
        ...

    def silu_mul(self, gate_up: jax.Array) -> jax.Array:
        """`silu(gate) * up` in float32; `[T, 2 N]`, gate first, to `[T, N]` in its dtype."""
        ...

    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        layer: jax.Array,
        window: jax.Array,
        cache: Any,
    ) -> tuple[jax.Array, Any]:
        """Store the tokens' keys and values in the cache and attend causally; scale 1/sqrt(D).

        Args:
            q: `[T, Hq, D]`, rotated.
            k: `[T, Hkv, D]`, rotated; query head h reads key-value head `h // (Hq // Hkv)`.
            v: `[T, Hkv, D]`.
            layer: `i32[]`.
            window: `i32[]`, how many tokens a query sees, itself included; 0 sees all.
            cache: a pytree of the engine's own, threaded through the layers.

        Returns:
            `[T, Hq, D]` in the dtype of q, and the cache.
        """
        ...
