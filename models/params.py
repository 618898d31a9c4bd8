"""The parameters of a decoder: the one place that says their names, shapes and order."""

from __future__ import annotations

from typing import NamedTuple

from ellm_jax.models.config import ModelConfig

Shape = tuple[int, ...]

_MATRICES = ("blocks.qkv", "blocks.o", "blocks.gate_up", "blocks.down", "lm_head")


class Held(NamedTuple):
    """A parameter as a decoder holds it.

    Attributes:
        shape: of all of it.
        dtype: "int8" or "float32"; None: that of the computation.
    """

    shape: Shape
    dtype: str | None


def scale_of(matrix: str) -> str:
    """The name of the scales of a matrix that is held as int8."""
    return f"{matrix}_scale"


def held_params(config: ModelConfig, quantization: str | None) -> dict[str, Held]:
    """What a decoder holds, by dotted name: with None the parameters of `param_shapes`.

    With "int8", the only other, every matrix of a linear layer is int8, with a float32 scale per
    output in a parameter of its own, `scale_of(name)`, without the last axis. Embeddings and
    vectors stay as they are; where the output head is the embedding, "lm_head" is held beside it.
    """
    held: dict[str, Held] = {}
    shapes = param_shapes(config)
    if quantization is not None:
        shapes.setdefault("lm_head", shapes["embed"])
    for name, shape in shapes.items():
        if quantization is None or name not in _MATRICES:
            held[name] = Held(shape, None)
        else:
            held[name] = Held(shape, quantization)
            held[scale_of(name)] = Held(shape[:-1], "float32")
    return held


def param_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Shapes by dotted name, as they stand in `Decoder` unless they are quantised.

    Names under `blocks.` are stacked over layers (first axis L). Matrices are `[outputs, inputs]`,
    as checkpoints store them; q, k and v are stacked along the outputs, and so are gate and up.
    """
    layers, hidden, inner = config.num_layers, config.hidden_size, config.intermediate_size
    qkv_size = config.q_size + 2 * config.kv_size
    shapes: dict[str, Shape] = {
        "embed": (config.vocab_size, hidden),
        "blocks.attn_norm": (layers, hidden),
        "blocks.qkv": (layers, qkv_size, hidden),
        "blocks.o": (layers, hidden, config.q_size),
        "blocks.mlp_norm": (layers, hidden),
        "blocks.gate_up": (layers, 2 * inner, hidden),
        "blocks.down": (layers, hidden, inner),
        "final_norm": (hidden,),
    }
    if config.qkv_bias:
        shapes["blocks.qkv_bias"] = (layers, qkv_size)
    if config.o_bias:
        shapes["blocks.o_bias"] = (layers, hidden)
    if config.mlp_bias:
        shapes["blocks.gate_up_bias"] = (layers, 2 * inner)
        shapes["blocks.down_bias"] = (layers, hidden)
    if config.qk_norm:
        shapes["blocks.q_norm"] = (layers, config.head_dim)
        shapes["blocks.k_norm"] = (layers, config.head_dim)
    if not config.tie_embeddings:
        shapes["lm_head"] = (config.vocab_size, hidden)
    return shapes
