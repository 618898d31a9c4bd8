"""The tiny model as a Hugging Face directory: configuration, and weights in and out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from safetensors.flax import load_file, save_file

from ellm_jax.models import ModelConfig, checkpoint_tensors, config_from_hf, param_shapes

# 2.36 M parameters: 4.7 MB in bfloat16.
HF_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 192,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 512,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "torch_dtype": "bfloat16",
}
GENERATION_CONFIG: dict[str, Any] = {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.95,
}

Params = Mapping[str, jax.Array]


def model_config() -> ModelConfig:
    return config_from_hf(HF_CONFIG)


def save_model(params: Params, directory: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors.

    Args:
        params: by dotted name, shaped as `param_shapes` says.
        directory: must exist.
    """
    config = model_config()
    tensors = {}
    for place in checkpoint_tensors(config):
        whole = params[place.param] if place.layer is None else params[place.param][place.layer]
        rows = whole[place.row : place.row + place.shape[0]]
        tensors[place.name] = rows.astype(jnp.bfloat16)
    _write_json(HF_CONFIG, directory / "config.json")
    _write_json(GENERATION_CONFIG, directory / "generation_config.json")
    # Renamed into place, so that a reader never sees half a file.
    part = directory / "model.safetensors.part"
    save_file(tensors, part, metadata={"format": "pt"})
    part.chmod(0o644)
    part.replace(directory / "model.safetensors")


def load_model(directory: Path) -> dict[str, jax.Array]:
    """The parameters by dotted name, in float32."""
    config = model_config()
    tensors = load_file(directory / "model.safetensors")
    params = {name: jnp.zeros(shape) for name, shape in param_shapes(config).items()}
    for place in checkpoint_tensors(config):
        at = slice(place.row, place.row + place.shape[0])
        index = at if place.layer is None else (place.layer, at)
        params[place.param] = params[place.param].at[index].set(tensors[place.name])
    return params


def _write_json(content: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
