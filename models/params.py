"""The parameters of a decoder: the one place that says their names, shapes and order."""

from __future__ import annotations

from ellm_jax.models.config import ModelConfig

Shape = tuple[int, ...]


def param_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Shapes by dotted name, as they stand in `Decoder`.

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
