"""Weights of bfloat16 that are put into panels while they are loaded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ellm_jax._native import pack_panels
from ellm_jax.checkpoint.aligned import aligned_empty
from ellm_jax.models import ModelConfig, Quantization, param_shapes, quantization_of
from ellm_jax.models.params import Held
from ellm_jax.models.quantization import PANELS
from ellm_jax.models.shards import Shards


def in_panels(
    config: ModelConfig, quantization: str | Quantization | None, shards: Shards
) -> Quantization:
    """The same, with the matrices that are not quantised in panels. An output head that is the
    embedding stays as it is, for rows of it are looked up; and so does everything where a matrix
    has an odd number of inputs."""
    chosen = quantization_of(quantization)
    inputs = [
        shards.part_shape(name, shape)[-1]
        for name, shape in param_shapes(config).items()
        if len(shape) > 1 and not name.endswith(("_bias", "norm"))
    ]
    if any(size % 2 for size in inputs):
        return chosen
    head = chosen.head if config.tie_embeddings else chosen.head or PANELS
    name = "bfloat16" if chosen.blocks is None else chosen.name
    return dataclasses.replace(chosen, name=name, blocks=chosen.blocks or PANELS, head=head)


class PanelsPart:
    """A device's part of a matrix, filled from its first row on."""

    def __init__(self, name: str, held: dict[str, Held], shards: Shards):
        self.name = name
        self._shape = shards.part_shape(name, held[name].shape)
        self._values: NDArray[Any] | None = None
        self._rows = 0

    def add(self, block: NDArray[Any]) -> bool:
        """Packs the next rows, `[..., K]` of bfloat16; True when they were the last."""
        if self._values is None:
            self._values = aligned_empty(self._shape, block.dtype)
        outputs, inputs = self._shape[-2:]
        matrices = self._values.view(np.uint16).reshape(-1, outputs, inputs)
        rows = block.view(np.uint16).reshape(-1, inputs)
        while len(rows):
            matrix, first = divmod(self._rows, outputs)
            fitting = rows[: outputs - first]
            pack_panels(fitting, first, matrices[matrix])
            self._rows += len(fitting)
            rows = rows[len(fitting) :]
        return self._rows == math.prod(self._shape[:-1])

    def params(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """What is held, by name."""
        assert self._values is not None
        yield self.name, self._values
