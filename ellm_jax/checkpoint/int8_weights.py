"""Weights that are quantised to int8 while they are loaded, a layer at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ellm_jax._native import quantize_int8
from ellm_jax.checkpoint.aligned import aligned_empty
from ellm_jax.models import ModelConfig, held_params, scale_of
from ellm_jax.models.params import Held
from ellm_jax.models.shards import Shards


def int8_names(config: ModelConfig) -> set[str]:
    """The parameters that are held as int8."""
    return {name for name, held in held_params(config, "int8").items() if held.dtype == "int8"}


def int8_params(
    params: Iterator[tuple[str, NDArray[Any]]], config: ModelConfig, shards: Shards
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yields what `held_params(config, "int8")` names, from parameters as the readers yield them:
    of each the parts of all devices, in their order.

    Matrices may come in any number of layers at a time; beside what it yields, one such block is
    held. Each output has the scale max |w| / 127, and its weights are rounded to the nearest step,
    ties to even.
    """
    held = held_params(config, "int8")
    names = int8_names(config)
    open_parts: dict[str, _Part] = {}
    for name, array in params:
        if name not in names:
            yield name, array
        if name == "embed" and config.tie_embeddings:
            name = "lm_head"
        if name in names:
            if name not in open_parts:
                open_parts[name] = _Part(name, held[name], shards)
            if open_parts[name].add(array):
                part = open_parts.pop(name)
                yield name, part.values
                yield scale_of(name), part.scales


class _Part:
    """A device's part of a matrix, filled from its first row on."""

    def __init__(self, name: str, held: Held, shards: Shards):
        shape = shards.part_shape(name, held.shape)
        self.values = aligned_empty(shape, np.dtype(np.int8))
        self.scales = aligned_empty(shape[:-1], np.dtype(np.float32))
        self._rows = 0

    def add(self, block: NDArray[Any]) -> bool:
        """Quantises the next rows, `[..., K]`; True when they were the last."""
        inputs = block.shape[-1]
        count = math.prod(block.shape[:-1])
        rows = slice(self._rows, self._rows + count)
        bits = block if block.dtype == np.float32 else block.view(np.uint16)
        quantize_int8(
            bits.reshape(count, inputs),
            self.values.reshape(-1, inputs)[rows],
            self.scales.reshape(-1)[rows],
        )
        self._rows += count
        return self._rows == self.scales.size
