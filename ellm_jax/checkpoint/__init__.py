"""Checkpoints: Hugging Face directories in, Orbax in and out. Nothing is ever unpickled."""

from __future__ import annotations

from ellm_jax.checkpoint.convert import convert
from ellm_jax.checkpoint.directory import read_config
from ellm_jax.checkpoint.errors import CheckpointError
from ellm_jax.checkpoint.load import COMPUTE_DTYPES, load_model, resolve_dtype, weights_bytes
from ellm_jax.checkpoint.panel_weights import in_panels
from ellm_jax.checkpoint.stored_weights import resolve_quantization

__all__ = [
    "COMPUTE_DTYPES",
    "CheckpointError",
    "convert",
    "in_panels",
    "load_model",
    "read_config",
    "resolve_dtype",
    "resolve_quantization",
    "weights_bytes",
]
