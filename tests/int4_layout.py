"""How 4-bit weights lie in memory, written out in numpy from the description of `Format`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def up(size: int, to: int) -> int:
    """Divided, rounded up."""
    return -(-size // to)


def unpacked(values: NDArray[np.uint8], outputs: int, inputs: int) -> NDArray[np.int64]:
    """Steps `[N, K]` of packed ones, `[N / 16, K / group, 8 group]`: 64 bytes for 8 inputs, 4 of
    each output, the first four inputs in their low halves and the next in their high ones."""
    panels, groups, eights = values.shape
    by_output = values.reshape(panels, groups * eights // 64, 16, 4).swapaxes(1, 2)
    both = np.concatenate([by_output & 15, by_output >> 4], axis=-1)
    return both.reshape(panels * 16, -1)[:outputs, :inputs].astype(np.int64)


def spread(scales: NDArray[Any], outputs: int, inputs: int, group: int) -> NDArray[np.float64]:
    """`[N / 16, G, 16]` to one per weight, `[N, K]`."""
    by_output = scales.swapaxes(1, 2).reshape(-1, scales.shape[1]).astype(np.float64)
    return np.repeat(by_output, group, axis=1)[:outputs, :inputs]


def dequantised(
    values: NDArray[np.uint8], scales: NDArray[Any], outputs: int, inputs: int, group: int
) -> NDArray[np.float64]:
    """The weights that steps and scales stand for, with zero points of 8."""
    return spread(scales, outputs, inputs, group) * (unpacked(values, outputs, inputs) - 8)
