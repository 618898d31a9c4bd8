"""Weights that are quantised to four bits while they are loaded, a layer at a time, or that are
stored so already."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ellm_jax._native import pack_int4, quantize_int4
from ellm_jax.checkpoint.aligned import aligned_empty
from ellm_jax.models import scale_of, zero_of
from ellm_jax.models.params import Held
from ellm_jax.models.quantization import PANEL_OUTPUTS
from ellm_jax.models.shards import Shards


class Int4Part:
    """A device's part of a matrix, filled from its first layer on."""

    def __init__(self, name: str, held: dict[str, Held], shards: Shards):
        def part(param: str) -> NDArray[Any]:
            shape = shards.part_shape(param, held[param].shape)
            return aligned_empty(shape, np.dtype(held[param].dtype))

        self.name = name
        self.values = part(name)
        self.scales = part(scale_of(name))
        self.zeros = part(zero_of(name)) if zero_of(name) in held else None
        self._layers = 0

    def add(self, block: NDArray[Any]) -> bool:
        """Quantises the next layers, `[..., N, K]`; True when they were the last. The scale of a
        group is the one of least squared error among several (`quantize_int4`)."""
        for matrix in block.reshape(-1, *block.shape[-2:]):
            values, scales, _ = self._next()
            bits = matrix if matrix.dtype == np.float32 else matrix.view(np.uint16)
            quantize_int4(bits, values, scales.view(np.uint16))
        return self._full()

    def add_steps(
        self, steps: NDArray[np.uint8], scales: NDArray[np.float32], zeros: NDArray[np.uint8]
    ) -> bool:
        """Packs the next layer as it is; True when it was the last.

        Args:
            steps: `[N, K]`, from 0 to 15.
            scales: `[N, K / group]`.
            zeros: `[N, K / group]`; all 8 where no zero points are held.
        """
        values, held_scales, held_zeros = self._next()
        pack_int4(steps, values)
        held_scales[...] = _in_panels(scales, held_scales.dtype)
        if held_zeros is not None:
            held_zeros[...] = _in_panels(zeros, held_zeros.dtype)
        return self._full()

    def params(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """What is held, by name."""
        yield self.name, self.values
        yield scale_of(self.name), self.scales
        if self.zeros is not None:
            yield zero_of(self.name), self.zeros

    def _next(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]:
        at = self._layers
        self._layers += 1
        zeros = None if self.zeros is None else _layers(self.zeros)[at]
        return _layers(self.values)[at], _layers(self.scales)[at], zeros

    def _full(self) -> bool:
        return self._layers == len(_layers(self.values))


def _layers(array: NDArray[Any]) -> NDArray[Any]:
    """The head has no layers: as one."""
    return array.reshape(-1, *array.shape[-3:])


def _in_panels(by_output: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """`[N, G]` to `[N / 16, G, 16]`, with zeros for the outputs that fill up the last panel."""
    outputs, groups = by_output.shape
    padded = np.zeros((-(-outputs // PANEL_OUTPUTS) * PANEL_OUTPUTS, groups), dtype)
    padded[:outputs] = by_output
    return padded.reshape(-1, PANEL_OUTPUTS, groups).swapaxes(1, 2)
