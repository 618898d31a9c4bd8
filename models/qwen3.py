"""Qwen3: q and k normalised per head; no biases by default; head size apart from hidden size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ellm_jax.models.config import ModelConfig
from ellm_jax.models.hf_config import HfConfig
from ellm_jax.models.tensors import llama_tensors as tensors

__all__ = ["ARCHITECTURE", "config_from_hf", "tensors"]

ARCHITECTURE = "Qwen3ForCausalLM"
_DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """Read config.json; raises ModelConfigError for what is invalid or unsupported."""
    fields = HfConfig(raw, "qwen3", _DEFAULTS)
    attention_bias = fields.flag("attention_bias")
    return fields.model_config(
        sliding_window=fields.windows_by_layer(),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        qk_norm=True,
    )
