"""Matrices that are held as the checkpoint stores them: its own steps and scales."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ellm_jax.checkpoint.aligned import aligned_empty
from ellm_jax.checkpoint.directory import checkpoint_directory, read_layout, weight_files
from ellm_jax.checkpoint.hf_weights import TensorFile, opened
from ellm_jax.checkpoint.int4_weights import Int4Part
from ellm_jax.checkpoint.packed import Codes, Layout, PackedFile
from ellm_jax.checkpoint.progress import Advance
from ellm_jax.models import (
    NAMED,
    Format,
    ModelConfig,
    Placement,
    Quantization,
    checkpoint_tensors,
    held_params,
    param_shapes,
    scale_of,
)
from ellm_jax.models.params import Held
from ellm_jax.models.shards import Piece, Shards

_log = logging.getLogger(__name__)
_LARGEST_SCALE = float(np.finfo(np.float16).max)
_HEAD = "lm_head"


def resolve_quantization(
    path: str | Path, config: ModelConfig, asked: str | None
) -> Quantization | None:
    """How the matrices of a checkpoint are to be held.

    With None: as it stores them, where they can be held so to the bit; else in the dtype of the
    computation. A name of `NAMED` counts for what is stored in another number of bits.
    """
    stored = stored_quantization(checkpoint_directory(path), config)
    if asked is None:
        return stored
    named = NAMED[asked]
    if stored is None or _bits(stored.blocks) != _bits(named.blocks):
        return named
    return dataclasses.replace(stored, head=stored.head or named.head)


def stored_quantization(folder: Path, config: ModelConfig) -> Quantization | None:
    """How a checkpoint stores its matrices, if it is quantised and they can be held so: all of the
    layers alike, in 4 bits with groups of a multiple of 32 neighbouring inputs, or in 8 bits with
    one scale per output and no zero points. Reads scales and zero points."""
    layout = read_layout(folder)
    if layout is None:
        return None
    forms: dict[bool, list[Format | None]] = {False: [], True: []}
    with opened(weight_files(folder), config, layout) as source:
        for placement in checkpoint_tensors(config):
            if len(placement.shape) == 2 and placement.param != "embed":
                file = source.get(placement.name)
                form = None
                if isinstance(file, PackedFile):
                    form = _form(file.codes(placement.name, whole=False))
                forms[placement.param == _HEAD].append(form)
    blocks, head = _common(forms[False]), _common(forms[True])
    if blocks is None:
        _log.info(
            "%s stores its matrices quantised (%s) in a way that they are not held in; they are "
            'dequantised (quantization="int8" or "int4" holds them in less)',
            folder,
            layout.name,
        )
        return None
    return Quantization(f"{layout.name}, {blocks.bits} bits", blocks, head)


def stored_params(
    files: list[Path],
    config: ModelConfig,
    layout: Layout,
    quantization: Quantization,
    names: Collection[str],
    itemsize: int,
    advance: Advance,
    shards: Shards,
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yields what `held_params` has of these matrices: of each the parts of all devices, in their
    order. Devices divide them by outputs. `advance` is told the bytes of elements of `itemsize`.

    Raises:
        CheckpointError: if the files are damaged.
    """
    held = held_params(config, quantization)
    by_param: dict[str, list[Placement]] = defaultdict(list)
    for placement in checkpoint_tensors(config):
        by_param[placement.param].append(placement)
    with opened(files, config, layout) as source:
        for name in names:
            whole = param_shapes(config)[name]
            form = quantization.format_of(name)
            assert form is not None
            part = shards.part_shape(name, whole)
            for index in range(shards.count):
                pieces = list(shards.pieces(name, config, whole, index))
                kind = _Int8Target if form.bits == 8 else Int4Part
                target = kind(name, held, shards)
                for layer in range(math.prod(part[:-2])):
                    of_layer = [p for p in by_param[name] if p.layer in (None, layer)]
                    _add_layer(target, of_layer, pieces, part[-2], form, source)
                    advance(part[-2] * part[-1] * itemsize)
                yield from target.params()


class _Int8Target:
    """A device's part of a matrix in 8 bits, filled from its first layer on."""

    def __init__(self, name: str, held: dict[str, Held], shards: Shards):
        shape = shards.part_shape(name, held[name].shape)
        self._name = name
        self._values = aligned_empty(shape, np.dtype(np.int8))
        self._scales = aligned_empty(shape[:-1], np.dtype(np.float32))
        self._rows = 0

    def add_steps(
        self, steps: NDArray[np.uint8], scales: NDArray[np.float32], zeros: NDArray[np.uint8]
    ) -> None:
        """The next layer: `[N, K]`, `[N, 1]` and zeros of 128."""
        rows = slice(self._rows, self._rows + len(steps))
        # Less 128, in the two's complement that int8 is.
        np.bitwise_xor(
            steps, 128, out=self._values.reshape(-1, steps.shape[1])[rows].view(np.uint8)
        )
        self._scales.reshape(-1)[rows] = scales[:, 0]
        self._rows += len(steps)

    def params(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """What is held, by name."""
        yield self._name, self._values
        yield scale_of(self._name), self._scales


def _add_layer(
    target: Int4Part | _Int8Target,
    placements: Iterable[Placement],
    pieces: Iterable[Piece],
    outputs: int,
    form: Format,
    source: Mapping[str, TensorFile],
) -> None:
    """Gathers the outputs of a device's part of one layer from the matrices that it consists of.
    Outputs beyond a vocabulary that does not divide evenly are zero."""
    rows: list[tuple[int, Codes, slice]] = []
    inputs = 0
    for piece in pieces:
        for placement in placements:
            begin = max(piece.begin, placement.row)
            end = min(piece.end, placement.row + placement.shape[0])
            if begin < end:
                file = source[placement.name]
                assert isinstance(file, PackedFile)
                codes = file.codes(placement.name)
                inputs = placement.shape[1]
                taken = slice(begin - placement.row, end - placement.row)
                rows.append((piece.at + begin - piece.begin, codes, taken))
    groups = -(-inputs // form.group) if form.group else 1
    middle = 2 ** (form.bits - 1)
    steps = np.full((outputs, inputs), middle, np.uint8)
    zeros = np.full((outputs, groups), middle, np.uint8)
    scales = np.zeros((outputs, groups), np.float32)
    for at, codes, taken in rows:
        to = slice(at, at + taken.stop - taken.start)
        # The group, as stored, of the first input of each group as held.
        columns = codes.groups[:: form.group or inputs]
        steps[to] = codes.codes[taken]
        zeros[to] = codes.zeros[taken][:, columns]
        scales[to] = codes.scales[taken][:, columns]
    target.add_steps(steps, scales, zeros)


def _bits(form: Format | None) -> int:
    return 0 if form is None else form.bits


def _form(codes: Codes) -> Format | None:
    """How a matrix can be held to the bit."""
    size, groups = codes.group(), codes.scales.shape[1]
    if size is None or np.abs(codes.scales).max() > _LARGEST_SCALE:
        return None
    if codes.bits == 8:
        plain = groups == 1 and bool((codes.zeros == 128).all())
        return Format(8) if plain else None
    group = next((g for g in (128, 32) if groups == 1 or size % g == 0), None)
    return None if group is None else Format(4, group, bool((codes.zeros != 8).any()))


def _common(forms: list[Format | None]) -> Format | None:
    """How all of these matrices can be held to the bit."""
    alike = [form for form in forms if form is not None]
    if not alike or len(alike) < len(forms) or len({form.bits for form in alike}) > 1:
        return None
    group = min(form.group for form in alike)
    return Format(alike[0].bits, group, any(form.zeros for form in alike))
