"""Host arrays that JAX can use in place."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ellm_jax.models.shards import Piece

# What XLA's CPU backend asks of a buffer that it shall use without a copy.
ALIGNMENT_BYTES = 64
_OWN_PAGES_BYTES = 1 << 20  # What has as many gets pages of its own.
_BLOCK_ELEMENTS = 2 << 20  # Of a matrix without layers.


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Uninitialised, row-major, starting at a multiple of `ALIGNMENT_BYTES`.

    `jax.device_put` of it on the CPU aliases the memory and keeps it alive; nothing may write to
    it after that. What is large is given back to the system when the last reference goes, where
    the heap would keep a block of a layer for the next one.

    Raises:
        MemoryError: the system has no more.
    """
    size_bytes = math.prod(shape) * dtype.itemsize
    if size_bytes >= _OWN_PAGES_BYTES:
        return np.frombuffer(_pages(size_bytes), dtype).reshape(shape)
    raw = np.empty(size_bytes + ALIGNMENT_BYTES, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT_BYTES
    return raw[start : start + size_bytes].view(dtype).reshape(shape)


def _pages(size_bytes: int) -> mmap.mmap:
    try:
        pages = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(
            f"the system has no {size_bytes:,} bytes for a parameter ({error}); end something else"
        ) from error
    with contextlib.suppress(AttributeError, OSError):  # Not every system has huge pages.
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def blocks_of(name: str, shape: tuple[int, ...], in_blocks: Collection[str]) -> list[range]:
    """What is read at a time into one array, along the first axis of a part of this shape: all of
    it; or, of the parameters in `in_blocks`, one layer, or some rows where there are no layers."""
    size = shape[0]
    step = size
    if name in in_blocks:
        step = 1 if name.startswith("blocks.") else _BLOCK_ELEMENTS // math.prod(shape[1:])
    step = max(1, step)
    return [range(begin, min(begin + step, size)) for begin in range(0, size, step)]


def blank(param: NDArray[Any], axis: int | None, last: Piece) -> int:
    """Zeroes what lies behind the last piece of a device's part, where a division was rounded up;
    returns the bytes."""
    if axis is None:
        return 0
    rest = param[(slice(None),) * axis + (slice(last.at + last.end - last.begin, None),)]
    rest[...] = 0
    return rest.nbytes
