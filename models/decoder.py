"""The decoder of all families (Flax NNX): what differs between them is configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from ellm_jax.models.collectives import closed, embedded, scored
from ellm_jax.models.config import ModelConfig
from ellm_jax.models.ops import ModelOps
from ellm_jax.models.params import Held, held_params, param_shapes, scale_of, zero_of
from ellm_jax.models.quantization import Quantization
from ellm_jax.models.rope import apply_rotation, rotation
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
    x: jax.Array,
    layer: jax.Array | None,
    outputs: int,
    out_dtype: DTypeLike | None = None,
) -> jax.Array:
    """x times a matrix of `owner` with so many outputs, in whichever way it is held; one that is
    not stacked over layers has no `layer`."""

    def stacked(param: str) -> jax.Array:
        array: jax.Array = getattr(owner, param)[...]
        return array if layer is not None else array[None]

    index = jnp.int32(0) if layer is None else layer
    if hasattr(owner, scale_of(name)):
        weight, scale = stacked(name), stacked(scale_of(name))
        if weight.dtype == jnp.int8:
            return ops.linear_int8(x, weight, scale, index, out_dtype)
        zero = stacked(zero_of(name)) if hasattr(owner, zero_of(name)) else None
        return ops.linear_int4(x, weight, scale, zero, index, outputs, out_dtype)
    return ops.linear(x, stacked(name), index, out_dtype)


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
        self, tokens: jax.Array, positions: jax.Array, ops: ModelOps, cache: Any
    ) -> tuple[jax.Array, Any]:
        """Run all layers over one step's tokens.

        Args:
            tokens: `i32[T]`; ids outside the vocabulary read its first or last row.
            positions: `i32[T]`, of each token in its own sequence.
            ops: the engine's matrix products and attention.
            cache: passed through `ops.attend`, layer by layer.

        Returns:
            Normalised hidden states `[T, H]` in the model's dtype, and the cache.
        """
        config, blocks, shards = self.config, self.blocks, self.shards
        cos, sin = rotation(config.rope, config.head_dim, positions)

        def block(carry: tuple[jax.Array, Any], this: dict[str, jax.Array]) -> tuple[Any, None]:
            x, cache = carry
            layer = this["layer"]

            def linear(x: jax.Array, name: str) -> jax.Array:
                def product(x: jax.Array) -> jax.Array:
                    return _product(ops, blocks, name, x, layer, self._outputs(f"blocks.{name}"))

                y = closed(shards, product, x) if name in CLOSING else product(x)
                return y + this[f"{name}_bias"] if f"{name}_bias" in this else y

            h = ops.rms_norm(x, this["attn_norm"], config.norm_eps)
            q, k, v = self._split_heads(linear(h, "qkv"))
            if config.qk_norm:
                q = ops.rms_norm(q, this["q_norm"], config.norm_eps)
                k = ops.rms_norm(k, this["k_norm"], config.norm_eps)
            q, k = apply_rotation(q, cos, sin), apply_rotation(k, cos, sin)
            mixed, cache = ops.attend(q, k, v, layer, this["window"], cache)
            x = x + linear(mixed.reshape(x.shape[0], -1), "o")

            h = ops.rms_norm(x, this["mlp_norm"], config.norm_eps)
            x = x + linear(ops.silu_mul(linear(h, "gate_up")), "down")
            return (x, cache), None

        x = embedded(shards, self.embed[...], tokens, config.vocab_size)
        (x, cache), _ = lax.scan(block, (x, cache), self._per_layer())
        return ops.rms_norm(x, self.final_norm[...], config.norm_eps), cache

    def logits(self, hidden: jax.Array, ops: ModelOps) -> jax.Array:
        """Scores of every token of the vocabulary: `[R, H]` in, `f32[R, V]` out."""
        head = "lm_head" if hasattr(self, "lm_head") else "embed"
        part = _product(ops, self, head, hidden, None, self._outputs("embed"), jnp.float32)
        return scored(self.shards, part, self.config.vocab_size)

    def _outputs(self, matrix: str) -> int:
        """Of a device's part of it."""
        shape = self.shards.part_shape(matrix, param_shapes(self.config)[matrix])
        return shape[-2]

    def _split_heads(self, qkv: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`[T, (Hq + 2 Hkv) D]` to `[T, Hq, D]`, `[T, Hkv, D]` and `[T, Hkv, D]`: the device's
        heads."""
        config = self.config
        heads = qkv.reshape(qkv.shape[0], -1, config.head_dim)
        num_heads = config.num_heads // self.shards.count
        num_kv_heads = config.num_kv_heads // self.shards.count
        q, k, v = jnp.split(heads, (num_heads, num_heads + num_kv_heads), axis=1)
        return q, k, v

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
