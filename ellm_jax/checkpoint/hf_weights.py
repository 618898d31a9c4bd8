"""Streaming a Hugging Face checkpoint into stacked parameters."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ellm_jax.checkpoint.aligned import aligned_empty, blank, blocks_of
from ellm_jax.checkpoint.errors import CheckpointError, a_few
from ellm_jax.checkpoint.packed import Layout, PackedFile
from ellm_jax.checkpoint.progress import Advance
from ellm_jax.checkpoint.safetensors_file import DTYPES, SafetensorsFile
from ellm_jax.models import ModelConfig, Placement, checkpoint_tensors, param_shapes
from ellm_jax.models.shards import WHOLE, Piece, Shards

# What is read between two reports of progress, and held while a dtype is converted.
PIECE_BYTES = 4 << 20

TensorFile = SafetensorsFile | PackedFile
"""What tensors are read from."""


def read_hf_params(
    files: list[Path],
    config: ModelConfig,
    dtype: np.dtype[Any],
    advance: Advance,
    shards: Shards = WHOLE,
    in_blocks: Collection[str] = (),
    layout: Layout | None = None,
    skip: Collection[str] = (),
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield the parameters of `param_shapes` one by one, in `dtype`: of each the parts of all
    devices, in their order. Only what a part holds is read for it. Those in `in_blocks` come in
    several arrays each: a layer in one, `[1, ...]`, or some rows where there are no layers.
    Matrices that are stored quantised in `layout` are dequantised. Parameters in `skip` are left
    out.

    Every file is checked before the first byte of weights is read. Beyond the arrays it yields it
    holds one piece of `PIECE_BYTES`. `advance` is told bytes of the result.

    Raises:
        CheckpointError: if tensors are missing, left over, or of the wrong shape or dtype.
    """
    with opened(files, config, layout) as source:
        by_param: dict[str, list[Placement]] = defaultdict(list)
        for placement in checkpoint_tensors(config):
            by_param[placement.param].append(placement)
        for name, shape in param_shapes(config).items():
            if name in skip:
                continue
            part = shards.part_shape(name, shape)
            for index in range(shards.count):
                for block in blocks_of(name, part, in_blocks):
                    param = aligned_empty((len(block), *part[1:]), dtype)
                    for piece in shards.pieces(name, config, shape, index):
                        if piece.axis == 0:
                            piece = piece.within(block)
                        for placement in by_param[name]:
                            layer = placement.layer
                            if layer is not None and layer not in block:
                                continue
                            at = slice(None) if layer is None else layer - block.start
                            _place(param[at], piece, placement, source[placement.name], advance)
                    advance(blank(param, shards.axis(name), piece))
                    yield name, param
                    del param  # not to hold two at once


@contextmanager
def opened(
    files: list[Path], config: ModelConfig, layout: Layout | None
) -> Iterator[Mapping[str, TensorFile]]:
    """Opens the files and says which has which tensor, once they are checked.

    Raises:
        CheckpointError: if tensors are missing, left over, or of the wrong shape or dtype.
    """
    with ExitStack() as stack:
        found = _index([stack.enter_context(SafetensorsFile(path)) for path in files])
        placements = list(checkpoint_tensors(config))
        source: Mapping[str, TensorFile] = found
        if layout is not None:
            source = PackedFile(found, layout).index({p.name for p in placements})
        _check(source, placements, config, files[0].parent)
        yield source


def _index(files: list[SafetensorsFile]) -> dict[str, SafetensorsFile]:
    """Which file has which tensor."""
    source: dict[str, SafetensorsFile] = {}
    for file in files:
        twice = source.keys() & file.tensors.keys()
        if twice:
            raise CheckpointError(
                f"{file.path} repeats tensors of another file: {a_few(twice)}. "
                "Is it from another checkpoint?"
            )
        source |= dict.fromkeys(file.tensors, file)
    return source


def _check(
    source: Mapping[str, TensorFile],
    placements: list[Placement],
    config: ModelConfig,
    folder: Path,
) -> None:
    wanted = {placement.name: placement for placement in placements}
    missing = wanted.keys() - source.keys()
    over = {name for name in source.keys() - wanted.keys() if not _harmless(name, config)}
    if missing or over:
        complaints = [
            f"{len(names)} tensors are {what}: {a_few(names)}"
            for names, what in ((missing, "missing"), (over, "left over"))
            if names
        ]
        raise CheckpointError(
            f"the weights in {folder} are not those of the {config.family} model that its "
            f"config.json describes: {'; '.join(complaints)}. Check that config.json and the "
            "weights belong together."
        )
    for name, placement in wanted.items():
        tensor = source[name].tensors[name]
        if tensor.shape != placement.shape:
            raise CheckpointError(
                f"{name} in {source[name].path} has shape {list(tensor.shape)}; config.json asks "
                f"for {list(placement.shape)}. Check that they belong together."
            )
        if tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"{name} in {source[name].path} has dtype {tensor.dtype}; supported: "
                f"{', '.join(DTYPES)}. Use a checkpoint that is not quantised."
            )


def _harmless(name: str, config: ModelConfig) -> bool:
    """Tensors that old releases stored, though they follow from the configuration."""
    if name.endswith("rotary_emb.inv_freq"):
        return True
    return config.tie_embeddings and name == "lm_head.weight"


def _place(
    block: NDArray[Any],
    piece: Piece,
    placement: Placement,
    file: TensorFile,
    advance: Advance,
) -> None:
    """Read what a piece has of a tensor into its place in a layer of a device's part of the
    parameter, or in the whole part where there are no layers."""
    if piece.axis == (0 if placement.layer is None else 1):
        begin = max(piece.begin, placement.row)
        end = min(piece.end, placement.row + placement.shape[0])
        if begin < end:
            at = piece.at + begin - piece.begin
            first = (begin - placement.row) * math.prod(placement.shape[1:])
            _fill(block[at : at + end - begin].reshape(-1), file, placement.name, first, advance)
        return
    columns = slice(piece.at, piece.at + piece.end - piece.begin)
    for row in range(placement.shape[0]):
        first = row * placement.shape[1] + piece.begin
        _fill(block[placement.row + row, columns], file, placement.name, first, advance)


def _fill(target: NDArray[Any], file: TensorFile, name: str, begin: int, advance: Advance) -> None:
    """Read a tensor's elements from `begin` on into their flat, contiguous place, converting piece
    by piece where needed."""
    tensor = file.tensors[name]
    stored = DTYPES[tensor.dtype]
    piece = PIECE_BYTES // max(stored.itemsize, target.itemsize)
    staging = None if stored == target.dtype else np.empty(min(piece, target.size), stored)
    for first in range(0, target.size, piece):
        part = target[first : first + piece]
        if staging is None:
            file.read_elements(tensor, begin + first, part)
        else:
            read = staging[: part.size]
            file.read_elements(tensor, begin + first, read)
            part[:] = read
        advance(part.nbytes)
