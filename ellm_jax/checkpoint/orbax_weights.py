"""Parameters as an Orbax checkpoint: one tree of stacked arrays in OCDBT, no pickle.

Orbax's own restore holds an array up to twice. The arrays are therefore read through TensorStore,
which Orbax stores them with, block by block into memory that JAX then uses in place.

Both libraries are imported when they are needed: that takes as long as the rest of a start.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from ellm_jax.checkpoint.aligned import aligned_empty, blank, blocks_of
from ellm_jax.checkpoint.directory import ORBAX_FOLDER
from ellm_jax.checkpoint.errors import CheckpointError, a_few
from ellm_jax.checkpoint.progress import Advance
from ellm_jax.models import ModelConfig, param_shapes
from ellm_jax.models.shards import WHOLE, Piece, Shards

# What is read, decompressed and converted at a time.
BLOCK_BYTES = 2 << 20


def write_orbax_params(folder: Path, params: Mapping[str, jax.Array]) -> None:
    """Write parameters by dotted name into `folder`; they appear there whole or not at all."""
    import orbax.checkpoint as ocp

    tree: dict[str, Any] = {}
    for name, array in params.items():
        *outer, last = name.split(".")
        branch = tree
        for part in outer:
            branch = branch.setdefault(part, {})
        branch[last] = array
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=BLOCK_BYTES), tree)
    # One gigabyte is the least that Orbax may hold in copies while it writes.
    handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=1)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(
            (folder / ORBAX_FOLDER).absolute(), ocp.args.PyTreeSave(tree, save_args=save_args)
        )


def read_orbax_params(
    folder: Path,
    config: ModelConfig,
    dtype: np.dtype[Any],
    advance: Advance,
    shards: Shards = WHOLE,
    in_blocks: Collection[str] = (),
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield the parameters of `param_shapes` one by one, in `dtype`: of each the parts of all
    devices, in their order. Those in `in_blocks` come in several arrays each: a layer in one,
    `[1, ...]`, or some rows where there are no layers.

    Raises:
        CheckpointError: if the checkpoint is damaged or not of this model.
    """
    import tensorstore as ts

    root = (folder / ORBAX_FOLDER).absolute()
    shapes = param_shapes(config)
    _check_names(root, set(shapes))
    # No cache: a block is wanted once.
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
    for name, shape in shapes.items():
        with _named(name, root):
            stored = ts.open(_spec(root, name), open=True, context=context).result()
            if stored.shape != shape:
                raise CheckpointError(
                    f"{name} in {root} has shape {list(stored.shape)}; config.json asks for "
                    f"{list(shape)}. Convert the model again."
                )
        part = shards.part_shape(name, shape)
        for index in range(shards.count):
            for block in blocks_of(name, part, in_blocks):
                param = aligned_empty((len(block), *part[1:]), dtype)
                with _named(name, root):
                    for piece in shards.pieces(name, config, shape, index):
                        if piece.axis == 0:
                            piece = piece.within(block)
                        _fill(param, stored, piece, block, advance)
                advance(blank(param, shards.axis(name), piece))
                yield name, param
                del param  # not to hold two at once


@contextlib.contextmanager
def _named(name: str, root: Path) -> Iterator[None]:
    """Errors say which array could not be read. TensorStore's are ValueErrors, of every kind."""
    try:
        yield
    except CheckpointError:
        raise
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{name} in {root} cannot be read: {error}. Convert the model again."
        ) from error


def _check_names(root: Path, wanted: set[str]) -> None:
    try:
        metadata = json.loads((root / "_METADATA").read_text(encoding="utf-8"))
        found = {
            ".".join(key["key"] for key in entry["key_metadata"])
            for entry in metadata["tree_metadata"].values()
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{root} is not a whole Orbax checkpoint: {error}. Convert the model again."
        ) from error
    if found != wanted:
        raise CheckpointError(
            f"the arrays in {root} are not those of the model in config.json: missing "
            f"{a_few(wanted - found) or 'none'}; left over {a_few(found - wanted) or 'none'}. "
            "Convert the model again."
        )


def _spec(root: Path, name: str) -> dict[str, Any]:
    """Where Orbax keeps an array: a zarr array per leaf, in one OCDBT database."""
    base = {"driver": "file", "path": f"{root}/"}
    return {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}


def _fill(param: NDArray[Any], stored: Any, piece: Piece, layers: range, advance: Advance) -> None:
    """Copy a piece of the stored array block by block, as it was chunked, converting the dtype. Of
    a stacked parameter only these layers."""
    import tensorstore as ts

    source = stored if stored.dtype == param.dtype else ts.cast(stored, param.dtype)
    target = ts.array(param)
    steps = stored.chunk_layout.read_chunk.shape
    bounds = [(0, size) for size in stored.shape]
    shift = [0] * len(bounds)
    if piece.axis > 0:  # Only what is stacked over layers is cut along another axis.
        bounds[0] = (layers.start, layers.stop)
        shift[0] = -layers.start
    bounds[piece.axis] = (piece.begin, piece.end)
    shift[piece.axis] = piece.at - piece.begin
    starts = (
        range(begin - begin % step, end, step)
        for (begin, end), step in zip(bounds, steps, strict=True)
    )
    for corner in itertools.product(*starts):
        block = [
            (max(start, begin), min(start + step, end))
            for start, step, (begin, end) in zip(corner, steps, bounds, strict=True)
        ]
        read = tuple(slice(begin, end) for begin, end in block)
        written = tuple(
            slice(begin + by, end + by) for (begin, end), by in zip(block, shift, strict=True)
        )
        target[written].write(source[read]).result()
        advance(param[written].nbytes)
