"""Model families: from a Hugging Face configuration to a decoder and its tensors.

Nothing here imports JAX; the decoder itself is `ellm_jax.models.decoder.Decoder`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from ellm_jax.models import llama, mistral, qwen2, qwen3
from ellm_jax.models.config import ModelConfig, ModelConfigError, RopeConfig
from ellm_jax.models.params import held_params, param_shapes, scale_of, zero_of
from ellm_jax.models.quantization import NAMED, Format, Quantization, quantization_of
from ellm_jax.models.tensors import Placement

__all__ = [
    "NAMED",
    "Format",
    "ModelConfig",
    "ModelConfigError",
    "Placement",
    "Quantization",
    "RopeConfig",
    "checkpoint_tensors",
    "config_from_hf",
    "held_params",
    "param_shapes",
    "quantization_of",
    "scale_of",
    "zero_of",
]


class Family(Protocol):
    """What the file of a family offers."""

    ARCHITECTURE: str

    def config_from_hf(self, raw: Mapping[str, Any]) -> ModelConfig:
        """Read config.json."""
        ...

    def tensors(self, config: ModelConfig) -> Iterator[Placement]:
        """List the tensors of a checkpoint."""
        ...


_FAMILIES: dict[str, Family] = {"llama": llama, "mistral": mistral, "qwen2": qwen2, "qwen3": qwen3}


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """Turn the contents of config.json into a ModelConfig.

    Raises:
        ModelConfigError: for an unknown architecture, or a field that is invalid or unsupported;
            it names the field, its value and what is supported.
    """
    family = raw.get("model_type")
    architectures = raw.get("architectures") or []
    if not set(architectures) <= {architecture for _, architecture in _architectures()}:
        raise _unknown("architectures", architectures)
    if family is None and architectures:
        family = next(name for name, known_as in _architectures() if known_as == architectures[0])
    if not isinstance(family, str) or family not in _FAMILIES:
        raise _unknown("model_type", family)
    module = _FAMILIES[family]
    if architectures and architectures != [module.ARCHITECTURE]:
        raise ModelConfigError(
            f"model_type={family!r} and architectures={architectures!r} in config.json do not "
            f"belong together; model_type={family!r} goes with [{module.ARCHITECTURE!r}]."
        )
    return module.config_from_hf(raw)


def checkpoint_tensors(config: ModelConfig) -> Iterator[Placement]:
    """Every tensor that a Hugging Face checkpoint of this model has, and where it goes."""
    return _FAMILIES[config.family].tensors(config)


def _architectures() -> list[tuple[str, str]]:
    return [(name, module.ARCHITECTURE) for name, module in _FAMILIES.items()]


def _unknown(field: str, value: object) -> ModelConfigError:
    supported = ", ".join(f"{known_as} ({name})" for name, known_as in _architectures())
    return ModelConfigError(
        f"{field}={value!r} in config.json is not supported; supported: {supported}. "
        "Convert the model to one of these or use another checkpoint."
    )
