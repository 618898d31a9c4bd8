"""Weights that are quantised to int8 while they are loaded, a layer at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ellm_jax._native import quantize_int8
from ellm_jax.checkpoint.aligned import aligned_empty
from ellm_jax.models import scale_of
from ellm_jax.models.params import Held
from ellm_jax.models.shards import Shards


class Int8Part:
    """A device's part of a matrix, filled from its first row on.

    Each output has the scale max |w| / 127, and its weights are rounded to the nearest step, ties
    to even.
    """

    def __init__(self, name: str, held: dict[str, Held], shards: Shards):
        shape = shards.part_shape(name, held[name].shape)
        self.name = name
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

    def params(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """What is held, by name."""
        yield self.name, self.values
        yield scale_of(self.name), self.scales
