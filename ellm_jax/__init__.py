"""Elastic memory for language-model serving on JAX (eLLM, arXiv 2506.15155)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ellm_jax.config import EngineConfig
from ellm_jax.outputs import CompletionOutput, RequestMetrics, RequestOutput, TokenLogprobs
from ellm_jax.sampling import SamplingParams
from ellm_jax.structured.output import StructuredOutput

if TYPE_CHECKING:
    from ellm_jax.engine import Engine, EngineClosed

__version__ = "0.1.0"

__all__ = [
    "CompletionOutput",
    "Engine",
    "EngineClosed",
    "EngineConfig",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutput",
    "TokenLogprobs",
]


def __getattr__(name: str) -> Any:
    """Imports JAX only when the engine is asked for: importing the package stays cheap."""
    if name in ("Engine", "EngineClosed"):
        from ellm_jax import engine

        return getattr(engine, name)
    raise AttributeError(f"module 'ellm_jax' has no attribute {name!r}")
