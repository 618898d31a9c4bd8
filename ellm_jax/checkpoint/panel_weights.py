"""Matrices that are put into panels after they were read."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ellm_jax._native import int8_panels, pack_panels
from ellm_jax.models import Format, ModelConfig, Quantization, param_shapes, quantization_of
from ellm_jax.models.quantization import WIDE_PANEL_OUTPUTS
from ellm_jax.models.shards import Shards

_WORD_BYTES = 4
_OF_GATES_AND_UPS = ("blocks.gate_up_bias", "blocks.gate_up_scale")


def in_panels(
    config: ModelConfig, quantization: str | Quantization | None, shards: Shards
) -> Quantization:
    """The same with all matrices in panels that kernels of the CPU multiply faster so: of bfloat16,
    which are those that are not quantised, and of int8 where the processor has instructions for it.
    For models that compute in bfloat16; what comes after the products in a call takes that.

    An output head that is the embedding stays as it is, for rows of it are looked up; and so does
    every matrix where one of them has a number of inputs that does not divide into words. Gates and
    ups take turns where each device's part of them fills panels.
    """
    chosen = quantization_of(quantization)
    inputs = [
        shards.part_shape(name, shape)[-1]
        for name, shape in param_shapes(config).items()
        if len(shape) > 1 and not name.endswith(("_bias", "norm"))
    ]

    gate_up = shards.part_shape("blocks.gate_up", param_shapes(config)["blocks.gate_up"])

    def held(form: Format | None) -> Format | None:
        bits = 16 if form is None else form.bits
        fits = all(size % (8 * _WORD_BYTES // bits) == 0 for size in inputs)
        if bits == 4 or not fits or (bits == 8 and not int8_panels()):
            return form
        return Format(bits, panels=True)

    blocks = held(chosen.blocks)
    tied = chosen.head is None and config.tie_embeddings
    return dataclasses.replace(
        chosen,
        name="bfloat16" if chosen.blocks is None else chosen.name,
        blocks=blocks,
        head=None if tied else held(chosen.head),
        by_turns=blocks is not None and blocks.panels and gate_up[-2] % WIDE_PANEL_OUTPUTS == 0,
    )


def put_into_panels(
    name: str, array: NDArray[Any], quantization: str | Quantization | None
) -> None:
    """Rearranges a device's part of a parameter in its place, if it is to be held so."""
    chosen = quantization_of(quantization)
    form = chosen.format_of(name)
    if name in _OF_GATES_AND_UPS and chosen.by_turns:
        halves = array.reshape(len(array), 2, -1, WIDE_PANEL_OUTPUTS // 2)
        array[...] = halves.swapaxes(1, 2).reshape(array.shape)
    elif form is not None and form.panels:
        by_turns = chosen.by_turns and name == "blocks.gate_up"
        words = array.view(np.uint32)
        for matrix in words.reshape(-1, *words.shape[-2:]):
            pack_panels(matrix, by_turns)
