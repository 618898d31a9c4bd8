"""Qwen2 and Qwen2.5: biases on q, k and v; the upper layers may have a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ellm_jax.models.config import ModelConfig
from ellm_jax.models.hf_config import HfConfig
from ellm_jax.models.tensors import llama_tensors as tensors

__all__ = ["ARCHITECTURE", "config_from_hf", "tensors"]

ARCHITECTURE = "Qwen2ForCausalLM"
_DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """Read config.json; raises ModelConfigError for what is invalid or unsupported."""
    fields = HfConfig(raw, "qwen2", _DEFAULTS)
    return fields.model_config(sliding_window=fields.windows_by_layer(), qkv_bias=True)
