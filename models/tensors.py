"""Where each tensor of a Hugging Face checkpoint goes in the stacked parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ellm_jax.models.config import ModelConfig
from ellm_jax.models.params import Shape


@dataclass(frozen=True)
class Placement:
    """One checkpoint tensor and the block of a parameter that it fills.

    Attributes:
        name: in the checkpoint.
        shape: in the checkpoint.
        param: dotted name in `param_shapes`.
        layer: first index of the parameter; None where it is not stacked over layers.
        row: where the tensor starts along its own first axis, within that layer.
    """

    name: str
    shape: Shape
    param: str
    layer: int | None = None
    row: int = 0


def llama_tensors(config: ModelConfig) -> Iterator[Placement]:
    """The naming that Llama introduced and the other families kept."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.q_size, config.kv_size
    yield Placement("model.embed_tokens.weight", (config.vocab_size, hidden), "embed")
    for layer in range(config.num_layers):
        # Checkpoint module, stacked parameter, outputs, inputs, first row, bias.
        matrices = (
            ("self_attn.q_proj", "qkv", q_size, hidden, 0, config.qkv_bias),
            ("self_attn.k_proj", "qkv", kv_size, hidden, q_size, config.qkv_bias),
            ("self_attn.v_proj", "qkv", kv_size, hidden, q_size + kv_size, config.qkv_bias),
            ("self_attn.o_proj", "o", hidden, q_size, 0, config.o_bias),
            ("mlp.gate_proj", "gate_up", inner, hidden, 0, config.mlp_bias),
            ("mlp.up_proj", "gate_up", inner, hidden, inner, config.mlp_bias),
            ("mlp.down_proj", "down", hidden, inner, 0, config.mlp_bias),
        )
        vectors = [
            ("input_layernorm", "attn_norm", hidden),
            ("post_attention_layernorm", "mlp_norm", hidden),
        ]
        if config.qk_norm:
            vectors += [
                ("self_attn.q_norm", "q_norm", config.head_dim),
                ("self_attn.k_norm", "k_norm", config.head_dim),
            ]
        prefix = f"model.layers.{layer}."
        for module, param, size in vectors:
            yield Placement(f"{prefix}{module}.weight", (size,), f"blocks.{param}", layer)
        for module, param, outputs, inputs, row, bias in matrices:
            yield Placement(
                f"{prefix}{module}.weight", (outputs, inputs), f"blocks.{param}", layer, row
            )
            if bias:
                yield Placement(
                    f"{prefix}{module}.bias", (outputs,), f"blocks.{param}_bias", layer, row
                )
    yield Placement("model.norm.weight", (hidden,), "final_norm")
    if not config.tie_embeddings:
        yield Placement("lm_head.weight", (config.vocab_size, hidden), "lm_head")
