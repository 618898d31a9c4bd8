"""Llama 2, 3 and 3.1+: full attention; biases only where the configuration asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ellm_jax.models.config import ModelConfig
from ellm_jax.models.hf_config import HfConfig
from ellm_jax.models.tensors import llama_tensors as tensors

__all__ = ["ARCHITECTURE", "config_from_hf", "tensors"]

ARCHITECTURE = "LlamaForCausalLM"
_DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """Read config.json; raises ModelConfigError for what is invalid or unsupported."""
    fields = HfConfig(raw, "llama", _DEFAULTS)
    attention_bias = fields.flag("attention_bias")
    return fields.model_config(
        sliding_window=(0,) * fields.count("num_hidden_layers"),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias"),
    )
