"""The parameters of a decoder: the one place that says their names, shapes and order."""

from __future__ import annotations

from typing import NamedTuple

from ellm_jax.models.config import ModelConfig
from ellm_jax.models.quantization import PANEL_OUTPUTS, Format, Quantization, quantization_of

Shape = tuple[int, ...]


class Held(NamedTuple):
    """A parameter as a decoder holds it.

    Attributes:
        shape: of all of it.
        dtype: None: that of the computation.
    """

    shape: Shape
    dtype: str | None


def scale_of(matrix: str) -> str:
    """The name of the scales of a quantised matrix."""
    return f"{matrix}_scale"


def zero_of(matrix: str) -> str:
    """The name of the zero points of a matrix that is held in 4 bits with such."""
    return f"{matrix}_zero"


def held_params(config: ModelConfig, quantization: str | Quantization | None) -> dict[str, Held]:
    """What a decoder holds, by dotted name: with None the parameters of `param_shapes`.

    A quantised matrix is followed by its scales, `scale_of(name)`, and its zero points,
    `zero_of(name)`, where it has such; `Format` says their shapes. Embeddings and vectors stay as
    they are; where the output head is the embedding, a quantised "lm_head" is held beside it.
    """
    held: dict[str, Held] = {}
    chosen = quantization_of(quantization)
    shapes = param_shapes(config)
    if chosen.head is not None:
        shapes.setdefault("lm_head", shapes["embed"])
    for name, shape in shapes.items():
        form = chosen.format_of(name)
        if form is None or form.bits == 16:
            held[name] = Held(shape, None)
        elif form.bits == 8:
            held[name] = Held(shape, "int8")
            held[scale_of(name)] = Held(shape[:-1], "float32")
        else:
            held |= _in_panels(name, shape, form)
    return held


def _in_panels(name: str, shape: Shape, form: Format) -> dict[str, Held]:
    *outer, outputs, inputs = shape
    groups = (*outer, -(-outputs // PANEL_OUTPUTS), -(-inputs // form.group))
    held = {
        name: Held((*groups, 8 * form.group), "uint8"),
        scale_of(name): Held((*groups, PANEL_OUTPUTS), "float16"),
    }
    if form.zeros:
        held[zero_of(name)] = Held((*groups, PANEL_OUTPUTS), "uint8")
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
