"""Streaming a Hugging Face checkpoint into stacked parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ellm_jax.checkpoint.aligned import aligned_empty
from ellm_jax.checkpoint.errors import CheckpointError, a_few
from ellm_jax.checkpoint.progress import Advance
from ellm_jax.checkpoint.safetensors_file import DTYPES, SafetensorsFile, element_count
from ellm_jax.models import ModelConfig, Placement, checkpoint_tensors, param_shapes

# What is read between two reports of progress, and held while a dtype is converted.
PIECE_BYTES = 4 << 20


def read_hf_params(
    files: list[Path], config: ModelConfig, dtype: np.dtype[Any], advance: Advance
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield the parameters of `param_shapes` one by one, complete, in `dtype`.

    Every file is checked before the first byte of weights is read. Beyond the arrays it yields it
    holds one piece of `PIECE_BYTES`. `advance` is told bytes of the result.

    Raises:
        CheckpointError: if tensors are missing, left over, or of the wrong shape or dtype.
    """
    with ExitStack() as stack:
        opened = [stack.enter_context(SafetensorsFile(path)) for path in files]
        source = _index(opened)
        placements = list(checkpoint_tensors(config))
        _check(source, placements, config, files[0].parent)
        by_param: dict[str, list[Placement]] = defaultdict(list)
        for placement in placements:
            by_param[placement.param].append(placement)
        for name, shape in param_shapes(config).items():
            param = aligned_empty(shape, dtype)
            for placement in by_param[name]:
                block = param if placement.layer is None else param[placement.layer]
                rows = block[placement.row : placement.row + placement.shape[0]]
                _fill(rows.reshape(-1), source[placement.name], placement.name, advance)
            yield name, param


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
    source: dict[str, SafetensorsFile],
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


def _fill(target: NDArray[Any], file: SafetensorsFile, name: str, advance: Advance) -> None:
    """Read a tensor into its flat, contiguous place, converting piece by piece where needed."""
    tensor = file.tensors[name]
    stored = DTYPES[tensor.dtype]
    piece = PIECE_BYTES // max(stored.itemsize, target.itemsize)
    staging = None if stored == target.dtype else np.empty(piece, stored)
    for first in range(0, element_count(tensor), piece):
        part = target[first : first + piece]
        if staging is None:
            file.read_elements(tensor, first, part)
        else:
            read = staging[: part.size]
            file.read_elements(tensor, first, read)
            part[:] = read
        advance(part.nbytes)
