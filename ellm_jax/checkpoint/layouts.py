"""Which format a checkpoint stores quantised matrices in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ellm_jax.checkpoint.awq import Awq
from ellm_jax.checkpoint.compressed_tensors import CompressedTensors
from ellm_jax.checkpoint.errors import CheckpointError
from ellm_jax.checkpoint.gptq import Gptq
from ellm_jax.checkpoint.packed import Layout

QUANTIZATION_FIELDS = ("quantization_config", "compression_config")
"""Fields of config.json that say how weights are stored, the newer first."""

_LAYOUTS: Mapping[str, Callable[[Mapping[str, Any]], Layout]] = {
    "gptq": Gptq,
    "awq": Awq,
    "compressed-tensors": CompressedTensors,
}


def layout_of(raw: Mapping[str, Any]) -> Layout | None:
    """How the weights beside a config.json are stored; None: as they are.

    Raises:
        CheckpointError: for a format that is not read, or a kind of it.
    """
    settings = next((raw[field] for field in QUANTIZATION_FIELDS if raw.get(field)), None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, Mapping) else settings
    if not isinstance(method, str) or method not in _LAYOUTS:
        raise CheckpointError(
            f"quant_method={method!r} in the quantization_config of config.json is not supported; "
            f"supported: {', '.join(_LAYOUTS)}. Use another checkpoint of the model, or one that "
            'is not quantised with quantization="int8" or "int4".'
        )
    return _LAYOUTS[method](settings)
