"""From a checkpoint directory to a decoder."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ellm_jax.checkpoint.directory import (
    checkpoint_directory,
    has_orbax_weights,
    read_config,
    weight_files,
)
from ellm_jax.checkpoint.errors import CheckpointError
from ellm_jax.checkpoint.hf_weights import read_hf_params
from ellm_jax.checkpoint.orbax_weights import read_orbax_params
from ellm_jax.checkpoint.progress import Advance, ProgressCallback, report
from ellm_jax.models import ModelConfig, param_shapes
from ellm_jax.models.decoder import Decoder

COMPUTE_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_log = logging.getLogger(__name__)


def load_model(
    path: str | Path, *, dtype: str | None = None, progress: bool | ProgressCallback = False
) -> tuple[Decoder, ModelConfig]:
    """Load a Hugging Face or converted directory onto JAX's default device.

    Host memory peaks at the weights plus a few MiB: bytes are read straight into the stacked
    parameters, which on the CPU backend become the JAX arrays without a copy.

    Args:
        path: the directory.
        dtype: of the parameters; None takes `resolve_dtype`'s choice.
        progress: True for a bar on stderr, or a callback of (bytes loaded, bytes in total).

    Raises:
        CheckpointError: if files are missing, damaged, or not what config.json describes.
        ModelConfigError: if the model is invalid or not supported.
    """
    folder = checkpoint_directory(path)
    config = read_config(folder)
    chosen = resolve_dtype(config, dtype)
    params = {}
    with report(progress, "Loading weights", weights_bytes(config, chosen)) as advance:
        for name, array in _read_params(folder, config, COMPUTE_DTYPES[chosen], advance):
            # Where the device has its own memory, wait: at most one parameter lies on the host.
            params[name] = jax.device_put(array).block_until_ready()
    return Decoder.from_params(config, params), config


def weights_bytes(model: str | Path | ModelConfig, dtype: str | None = None) -> int:
    """Bytes of a model's parameters, exactly, without loading them."""
    config = model if isinstance(model, ModelConfig) else read_config(model)
    itemsize = COMPUTE_DTYPES[resolve_dtype(config, dtype)].itemsize
    return itemsize * sum(math.prod(shape) for shape in param_shapes(config).values())


def resolve_dtype(config: ModelConfig, dtype: str | None) -> str:
    """The dtype to compute in: the one asked for, else the checkpoint's.

    A float16 checkpoint becomes bfloat16: as many bytes, a wider range, three bits less precision.
    Ask for float32 to keep every bit, at twice the memory.

    Raises:
        CheckpointError: if `dtype` is not one that models compute in.
    """
    if dtype is None:
        if config.dtype in COMPUTE_DTYPES:
            return config.dtype
        _log.warning(
            "the checkpoint is %s, which is not computed in; it is loaded as bfloat16 "
            "(ask for float32 to keep its precision)",
            config.dtype,
        )
        return "bfloat16"
    if dtype not in COMPUTE_DTYPES:
        raise CheckpointError(
            f"dtype={dtype!r} is not supported; supported: {', '.join(COMPUTE_DTYPES)}, or None "
            "for the checkpoint's own."
        )
    return dtype


def _read_params(
    folder: Path, config: ModelConfig, dtype: np.dtype[Any], advance: Advance
) -> Iterator[tuple[str, NDArray[Any]]]:
    if has_orbax_weights(folder):
        return read_orbax_params(folder, config, dtype, advance)
    return read_hf_params(weight_files(folder), config, dtype, advance)
