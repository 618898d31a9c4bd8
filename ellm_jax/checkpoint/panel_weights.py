"""Matrices that are put into panels after they were read."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ellm_jax._native import int8_panels, pack_panels
from ellm_jax.models import Format, ModelConfig, Quantization, param_shapes, quantization_of
from ellm_jax.models.shards import Shards

_WORD_BYTES = 4


def in_panels(
    config: ModelConfig, quantization: str | Quantization | None, shards: Shards
) -> Quantization:
    """The same with all matrices in panels that kernels of the CPU multiply faster so: of bfloat16,
    which are those that are not quantised, and of int8 where the processor has instructions for it.

    An output head that is the embedding stays as it is, for rows of it are looked up; and so does
    every matrix where one of them has a number of inputs that does not divide into words.
    """
    chosen = quantization_of(quantization)
    inputs = [
        shards.part_shape(name, shape)[-1]
        for name, shape in param_shapes(config).items()
        if len(shape) > 1 and not name.endswith(("_bias", "norm"))
    ]

    def held(form: Format | None) -> Format | None:
        bits = 16 if form is None else form.bits
        fits = all(size % (8 * _WORD_BYTES // bits) == 0 for size in inputs)
        if bits == 4 or not fits or (bits == 8 and not int8_panels()):
            return form
        return Format(bits, panels=True)

    tied = chosen.head is None and config.tie_embeddings
    return dataclasses.replace(
        chosen,
        name="bfloat16" if chosen.blocks is None else chosen.name,
        blocks=held(chosen.blocks),
        head=None if tied else held(chosen.head),
    )


def put_into_panels(
    name: str, array: NDArray[Any], quantization: str | Quantization | None
) -> None:
    """Rearranges a device's part of a parameter in its place, if it is to be held so."""
    form = quantization_of(quantization).format_of(name)
    if form is None or not form.panels:
        return
    words = array.view(np.uint32)
    for matrix in words.reshape(-1, *words.shape[-2:]):
        pack_panels(matrix)
