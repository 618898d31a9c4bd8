"""Matrices that are quantised while they are loaded."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from numpy.typing import NDArray

from ellm_jax.checkpoint.int4_weights import Int4Part
from ellm_jax.checkpoint.int8_weights import Int8Part
from ellm_jax.models import ModelConfig, Quantization, held_params
from ellm_jax.models.shards import Shards


def quantized_names(config: ModelConfig, quantization: Quantization) -> set[str]:
    """The matrices that are held in less than the dtype of the computation."""
    held = held_params(config, quantization)
    forms = {name: quantization.format_of(name) for name in held}
    return {name for name, form in forms.items() if form is not None and form.bits < 16}


def quantized_params(
    params: Iterator[tuple[str, NDArray[Any]]],
    config: ModelConfig,
    shards: Shards,
    quantization: Quantization,
    names: Collection[str],
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yields what `held_params` names, from parameters as the readers yield them: of each the parts
    of all devices, in their order. Only the matrices in `names` are quantised.

    Matrices may come in any number of layers, or rows, at a time; beside what it yields, one such
    block is held.
    """
    held = held_params(config, quantization)
    open_parts: dict[str, Int4Part | Int8Part] = {}
    for name, array in params:
        if name not in names:
            yield name, array
        if name == "embed" and config.tie_embeddings:
            name = "lm_head"
        if name in names:
            if name not in open_parts:
                kind = Int8Part if held[name].dtype == "int8" else Int4Part
                open_parts[name] = kind(name, held, shards)
            if open_parts[name].add(array):
                yield from open_parts.pop(name).params()
        del array  # not to hold two at once
