"""The decoder of all families (Flax NNX): what differs between them is configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from ellm_jax.models.collectives import closed, embedded, scored
from ellm_jax.models.config import ModelConfig
from ellm_jax.models.ops import Finish, HeadNorms, ModelOps
from ellm_jax.models.params import Held, held_params, param_shapes, scale_of, zero_of
from ellm_jax.models.quantization import Format, Quantization, quantization_of
from ellm_jax.models.rope import rotation
from ellm_jax.models.shards import CLOSING, WHOLE, Shards

# Per-layer vectors: small enough that a scan may slice them. The matrices stay whole.
_SCANNED = (
    "attn_norm",
    "mlp_norm",
    "q_norm",
    "k_norm",
    "qkv_bias",
    "o_bias",
    "gate_up_bias",
    "down_bias",
)


def _initial(name: str, held: Held, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Param:
    if held.dtype is not None:
        return nnx.Param(jnp.zeros(held.shape, held.dtype))
    if name.endswith("norm"):
        return nnx.Param(jnp.ones(held.shape, dtype))
    if name.endswith("bias"):
        return nnx.Param(jnp.zeros(held.shape, dtype))
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), held.shape, dtype))


def _product(
    ops: ModelOps,
    owner: nnx.Module,
    name: str,
    form: Format | None,
    x: jax.Array,
    layer: jax.Array | None,
    outputs: int,
    out_dtype: DTypeLike | None = None,
    finish: Finish | None = None,
) -> jax.Array:
    """x times a matrix of `owner` with so many outputs, which is held in this form; one that is not
    stacked over layers has no `layer`. Only in panels there is something to `finish`."""

    def stacked(param: str) -> jax.Array:
        array: jax.Array = getattr(owner, param)[...]
        return array if layer is not None else array[None]

    index = jnp.int32(0) if layer is None else layer
    weight = stacked(name)
    if form is None:
        return ops.linear(x, weight, index, out_dtype)
    if form.bits == 16:
        return ops.linear(x, weight, index, out_dtype, panels=form.panels, finish=finish)
    scale = stacked(scale_of(name))
    if form.bits == 8:
        return ops.linear_int8(
            x, weight, scale, index, out_dtype, panels=form.panels, finish=finish
        )
    zero = stacked(zero_of(name)) if form.zeros else None
    return ops.linear_int4(x, weight, scale, zero, index, outputs, out_dtype)


class Wanted(NamedTuple):
    """Rows of a step whose hidden states somebody reads: the last layer computes no others once
    their keys and values are known.

    Attributes:
        rows: `i32[R]`.
        ops: the engine's operations, on so many rows.
    """

    rows: jax.Array
    ops: ModelOps


class Blocks(nnx.Module):
    """The layers' parameters, each stacked over all layers; see `held_params`."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        quantization: str | Quantization | None,
    ):
        for name, held in held_params(config, quantization).items():
            if name.startswith("blocks."):
                setattr(self, name.removeprefix("blocks."), _initial(name, held, dtype, rngs))


class Decoder(nnx.Module):
    """A decoder-only transformer over a flat list of tokens.

    Divided among several devices, it holds the parameters of all of them, and is called inside a
    `shard_map` over them, where each device sees its part.

    Attributes:
        config: static; of the whole model.
        shards: static; how it is divided.
        quantization: static; how its matrices are held, see `held_params`.
        embed: `[V, H]`.
        blocks: the layers, stacked.
        final_norm: `[H]`.
        lm_head: `[V, H]`; absent where the embedding is tied and not quantised.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        shards: Shards = WHOLE,
        quantization: str | Quantization | None = None,
    ):
        self.config = config
        self.shards = shards
        self.quantization = quantization
        for name, held in held_params(config, quantization).items():
            if not name.startswith("blocks."):
                setattr(self, name, _initial(name, held, dtype, rngs))
        self.blocks = Blocks(config, dtype=dtype, rngs=rngs, quantization=quantization)

    @classmethod
    def from_params(
        cls,
        config: ModelConfig,
        params: Mapping[str, jax.Array],
        shards: Shards = WHOLE,
        quantization: str | Quantization | None = None,
    ) -> Decoder:
        """A decoder of existing arrays: those of `held_params`, by dotted name. Divided, they are
        of `Shards.joint_shape`: the parts of the devices behind each other."""
        made = nnx.eval_shape(
            lambda: cls(config, rngs=nnx.Rngs(0), shards=shards, quantization=quantization)
        )
        graph, state = nnx.split(made)
        filled = [
            (path, variable.replace(params[".".join(path)]))
            for path, variable in nnx.to_flat_state(state)
        ]
        model: Decoder = nnx.merge(graph, nnx.from_flat_state(filled))
        return model

    def named_params(self) -> dict[str, jax.Array]:
        """The parameters by dotted name, as `from_params` takes them."""
        flat = nnx.to_flat_state(nnx.state(self, nnx.Param))
        return {".".join(path): variable[...] for path, variable in flat}

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        ops: ModelOps,
        cache: Any,
        wanted: Wanted | None = None,
    ) -> tuple[jax.Array, Any]:
        """Run all layers over one step's tokens.

        Args:
            tokens: `i32[T]`; ids outside the vocabulary read its first or last row.
            positions: `i32[T]`, of each token in its own sequence.
            ops: the engine's matrix products and attention.
            cache: passed through `ops.attend`, layer by layer.
            wanted: the rows that the caller reads; None: all T.

        Returns:
            Normalised hidden states `[T, H]` in the model's dtype, or `[R, H]` of the wanted rows,
            and the cache.
        """
        config = self.config
        cos, sin = rotation(config.rope, config.head_dim, positions)
        kv_heads = config.num_kv_heads // self.shards.count

        def mix(
            x: jax.Array, cache: Any, this: dict[str, jax.Array]
        ) -> tuple[jax.Array, jax.Array, Any]:
            h = ops.rms_norm(x, this["attn_norm"], config.norm_eps)
            norms = None
            if config.qk_norm:
                norms = HeadNorms(this["q_norm"], this["k_norm"], config.norm_eps)
            q, k, v = ops.heads(self._linear(ops, h, "qkv", this), cos, sin, kv_heads, norms)
            mixed, cache = ops.attend(q, k, v, this["layer"], this["window"], cache)
            return x, mixed.reshape(x.shape[0], -1), cache

        def finish(
            ops: ModelOps, x: jax.Array, mixed: jax.Array, this: dict[str, jax.Array]
        ) -> jax.Array:
            x = self._linear(ops, mixed, "o", this, add=x)
            h = ops.rms_norm(x, this["mlp_norm"], config.norm_eps)
            return self._linear(ops, self._gated(ops, h, this), "down", this, add=x)

        def block(carry: tuple[jax.Array, Any], this: dict[str, jax.Array]) -> tuple[Any, None]:
            x, mixed, cache = mix(*carry, this)
            return (finish(ops, x, mixed, this), cache), None

        carry = embedded(self.shards, self.embed[...], tokens, config.vocab_size), cache
        layers = self._per_layer()
        if wanted is None:
            (x, cache), _ = lax.scan(block, carry, layers)
        else:
            carry, _ = lax.scan(block, carry, {name: each[:-1] for name, each in layers.items()})
            last = {name: each[-1] for name, each in layers.items()}
            x, mixed, cache = mix(*carry, last)
            x, ops = finish(wanted.ops, x[wanted.rows], mixed[wanted.rows], last), wanted.ops
        return ops.rms_norm(x, self.final_norm[...], config.norm_eps), cache

    def _linear(
        self,
        ops: ModelOps,
        x: jax.Array,
        name: str,
        this: dict[str, jax.Array],
        add: jax.Array | None = None,
    ) -> jax.Array:
        """x times a matrix of a layer, of which `this` is all that is not a matrix, and its bias
        and `add` on top."""
        form = self._form(f"blocks.{name}")
        bias = this.get(f"{name}_bias")
        if form is not None and form.panels and not (name in CLOSING and self.shards.count > 1):
            return self._multiplied(ops, x, name, this, Finish(bias, add))
        if name in CLOSING:
            y = closed(self.shards, lambda x: self._multiplied(ops, x, name, this), x)
        else:
            y = self._multiplied(ops, x, name, this)
        y = y if bias is None else y + bias
        return y if add is None else add + y

    def _gated(self, ops: ModelOps, x: jax.Array, this: dict[str, jax.Array]) -> jax.Array:
        """`silu(gate) * up` of a layer's MLP."""
        if quantization_of(self.quantization).by_turns:
            finish = Finish(this.get("gate_up_bias"), gated=True)
            return self._multiplied(ops, x, "gate_up", this, finish)
        return ops.silu_mul(self._linear(ops, x, "gate_up", this))

    def _multiplied(
        self,
        ops: ModelOps,
        x: jax.Array,
        name: str,
        this: dict[str, jax.Array],
        finish: Finish | None = None,
    ) -> jax.Array:
        matrix = f"blocks.{name}"
        outputs, form = self._outputs(matrix), self._form(matrix)
        return _product(ops, self.blocks, name, form, x, this["layer"], outputs, finish=finish)

    def logits(self, hidden: jax.Array, ops: ModelOps) -> jax.Array:
        """Scores of every token of the vocabulary: `[R, H]` in, `f32[R, V]` out."""
        head = "lm_head" if hasattr(self, "lm_head") else "embed"
        outputs = self._outputs("embed")
        part = _product(ops, self, head, self._form(head), hidden, None, outputs, jnp.float32)
        return scored(self.shards, part, self.config.vocab_size)

    def _form(self, matrix: str) -> Format | None:
        return quantization_of(self.quantization).format_of(matrix)

    def _outputs(self, matrix: str) -> int:
        """Of a device's part of it."""
        shape = self.shards.part_shape(matrix, param_shapes(self.config)[matrix])
        return shape[-2]

    def _per_layer(self) -> dict[str, jax.Array]:
        """What the scan over layers slices: the index, the window and the small vectors."""
        config = self.config
        scanned = {
            "layer": jnp.arange(config.num_layers, dtype=jnp.int32),
            "window": jnp.asarray(config.sliding_window, dtype=jnp.int32),
        }
        for name in _SCANNED:
            if hasattr(self.blocks, name):
                scanned[name] = getattr(self.blocks, name)[...]
        return scanned
