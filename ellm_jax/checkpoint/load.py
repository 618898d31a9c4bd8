"""From a checkpoint directory to a decoder."""

from __future__ import annotations

import dataclasses
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
    read_layout,
    weight_files,
)
from ellm_jax.checkpoint.errors import CheckpointError
from ellm_jax.checkpoint.hf_weights import read_hf_params
from ellm_jax.checkpoint.orbax_weights import read_orbax_params
from ellm_jax.checkpoint.panel_weights import put_into_panels
from ellm_jax.checkpoint.progress import Advance, ProgressCallback, report
from ellm_jax.checkpoint.quantized_weights import quantized_names, quantized_params
from ellm_jax.checkpoint.random_weights import random_params
from ellm_jax.checkpoint.stored_weights import stored_params, stored_quantization
from ellm_jax.models import Format, ModelConfig, Quantization, held_params, quantization_of
from ellm_jax.models.collectives import each_device, mesh_of, param_sharding
from ellm_jax.models.decoder import Decoder
from ellm_jax.models.params import Shape
from ellm_jax.models.shards import WHOLE, Shards

COMPUTE_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_log = logging.getLogger(__name__)


def load_model(
    path: str | Path,
    *,
    dtype: str | None = None,
    progress: bool | ProgressCallback = False,
    load_format: str = "auto",
    placement: jax.sharding.Sharding | None = None,
    shards: Shards = WHOLE,
    quantization: str | Quantization | None = None,
) -> tuple[Decoder, ModelConfig]:
    """Load a Hugging Face or converted directory onto a device, or divided onto several.

    Host memory peaks at the weights plus a few MiB: bytes are read straight into the stacked
    parameters, which on the CPU backend become the JAX arrays without a copy. Where devices have
    memory of their own, it peaks at one device's part of the largest parameter. A device is given
    its part alone, and only that is read for it. Matrices that are quantised are read a layer at a
    time, so the peak is what the model then holds and one layer's largest matrix, or the embedding.

    Args:
        path: the directory.
        dtype: of the parameters; None takes `resolve_dtype`'s choice.
        progress: True for a bar on stderr, or a callback of (bytes loaded, bytes in total), in
            `dtype`, as they are before they are quantised.
        load_format: "auto": the weights that are there; "dummy": random ones, for which the
            directory needs no more than config.json.
        placement: where the parameters go; None: JAX's default device. Divided, it is over the
            mesh of the devices.
        shards: how the model is divided.
        quantization: how the matrices are held; see `held_params`. With None in `dtype`, also
            those that the checkpoint stores quantised; `resolve_quantization` says how it does.

    Raises:
        CheckpointError: if files are missing, damaged, or not what config.json describes.
        ModelConfigError: if the model is invalid or not supported.
    """
    folder = checkpoint_directory(path)
    config = read_config(folder)
    chosen = resolve_dtype(config, dtype)
    computed = COMPUTE_DTYPES[chosen]
    places = each_device(placement)
    parts: dict[str, list[jax.Array]] = {name: [] for name in held_params(config, quantization)}
    made = quantization if load_format == "dummy" else None
    total_bytes = shards.count * weights_bytes(config, chosen, shards, made)
    with report(progress, "Loading weights", total_bytes) as advance:
        if load_format == "dummy":
            for name, part in random_params(config, computed, places, shards, quantization):
                parts[name].append(part.block_until_ready())
                advance(part.nbytes)
        else:
            for name, array in _read_params(
                folder, config, computed, advance, shards, quantization
            ):
                put_into_panels(name, array, quantization)
                # Where the device has its own memory, wait: at most one part lies on the host.
                place = places[len(parts[name])]
                parts[name].append(jax.device_put(array, place).block_until_ready())
                del array  # not to hold two at once
    params = {
        name: _joined(name, held.shape, shards, placement, parts[name])
        for name, held in held_params(config, quantization).items()
    }
    return Decoder.from_params(config, params, shards, quantization), config


def _joined(
    name: str,
    whole: Shape,
    shards: Shards,
    placement: jax.sharding.Sharding | None,
    parts: list[jax.Array],
) -> jax.Array:
    """One array of the devices' parts; nothing moves."""
    mesh = mesh_of(placement)
    if mesh is None:
        return parts[0]
    sharding = param_sharding(mesh, shards, name)
    return jax.make_array_from_single_device_arrays(
        shards.joint_shape(name, whole), sharding, parts
    )


def weights_bytes(
    model: str | Path | ModelConfig,
    dtype: str | None = None,
    shards: Shards = WHOLE,
    quantization: str | Quantization | None = None,
) -> int:
    """Bytes of a model's parameters on each device, exactly, without loading them."""
    config = model if isinstance(model, ModelConfig) else read_config(model)
    computed = COMPUTE_DTYPES[resolve_dtype(config, dtype)]
    return sum(
        (computed if held.dtype is None else np.dtype(held.dtype)).itemsize
        * math.prod(shards.part_shape(name, held.shape))
        for name, held in held_params(config, quantization).items()
    )


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


def _values(form: Format | None) -> Format | None:
    """A format, however the values lie."""
    return form and dataclasses.replace(form, panels=False)


def _read_params(
    folder: Path,
    config: ModelConfig,
    dtype: np.dtype[Any],
    advance: Advance,
    shards: Shards,
    quantization: str | Quantization | None,
) -> Iterator[tuple[str, NDArray[Any]]]:
    chosen = quantization_of(quantization)
    names = quantized_names(config, chosen)
    if has_orbax_weights(folder):
        params = read_orbax_params(folder, config, dtype, advance, shards, names)
    else:
        files, layout = weight_files(folder), read_layout(folder)
        as_stored: set[str] = set()
        if layout is not None and names:
            stored = quantization_of(stored_quantization(folder, config))
            as_stored = {
                n for n in names if _values(chosen.format_of(n)) == _values(stored.format_of(n))
            }
            yield from stored_params(
                files, config, layout, chosen, as_stored, dtype.itemsize, advance, shards
            )
            names -= as_stored
        params = read_hf_params(
            files, config, dtype, advance, shards, names, layout, skip=as_stored
        )
    yield from quantized_params(params, config, shards, chosen, names)
