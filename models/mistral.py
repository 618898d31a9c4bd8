"""Mistral: Llama with a sliding window over every layer, where the window is not null."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ellm_jax.models.config import ModelConfig
from ellm_jax.models.hf_config import HfConfig
from ellm_jax.models.tensors import llama_tensors as tensors

__all__ = ["ARCHITECTURE", "config_from_hf", "tensors"]

ARCHITECTURE = "MistralForCausalLM"
_DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """Read config.json; raises ModelConfigError for what is invalid or unsupported."""
    fields = HfConfig(raw, "mistral", _DEFAULTS)
    window = fields.window()
    types = fields.get("layer_types")
    # One window for all layers is what the family means; a file that says otherwise is read in
    # different ways by different libraries.
    expected = "sliding_attention" if window else "full_attention"
    if types is not None and any(kind != expected for kind in types):
        raise fields.unsupported(
            "layer_types", types, f"{expected} in every layer (sliding_window={window or None})"
        )
    return fields.model_config(sliding_window=(window,) * fields.count("num_hidden_layers"))
