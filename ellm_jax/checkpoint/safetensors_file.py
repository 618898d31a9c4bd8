"""One safetensors file, read with plain reads into memory that the caller owns.

The library's own reader maps the file, and mapped pages count as resident memory: a checkpoint
would be held twice while it loads.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ellm_jax.checkpoint.errors import CheckpointError

# float8, integers and packed formats are quantised weights, which need more than a cast.
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's place in its file.

    Attributes:
        dtype: as the format names it, "F32" for example.
        shape: row-major.
        offset_bytes: from the start of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int


class SafetensorsFile:
    """An open, validated file.

    Attributes:
        path: of the file.
        tensors: by name.
    """

    def __init__(self, path: Path):
        """Open the file and check that its header covers it exactly.

        Raises:
            CheckpointError: if it is missing, truncated or not safetensors.
        """
        self.path = path
        try:
            with safe_open(path, framework="numpy"):
                pass
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} does not exist. Is the download complete?") from error
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} ({_size_bytes(path)} bytes) is not a whole safetensors file: {error}. "
                "It may be truncated; download or copy it again."
            ) from error
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        header_bytes = int.from_bytes(os.pread(self._fd, 8, 0), "little")
        header = json.loads(os.pread(self._fd, header_bytes, 8))
        self.tensors = {
            name: StoredTensor(
                entry["dtype"], tuple(entry["shape"]), 8 + header_bytes + entry["data_offsets"][0]
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }

    def read_elements(self, tensor: StoredTensor, first: int, target: NDArray[Any]) -> None:
        """Fill `target` (contiguous, of the tensor's dtype) with elements from `first` on.

        Raises:
            CheckpointError: if the file ends early, having shrunk since it was opened.
        """
        view = target.reshape(-1).view(np.uint8).data
        offset = tensor.offset_bytes + first * target.itemsize
        while view:
            count = os.preadv(self._fd, [view], offset)
            if count == 0:
                raise CheckpointError(
                    f"{self.path} ended at byte {offset} while it was being read, {len(view)} "
                    "bytes early. Does something else write to it?"
                )
            view, offset = view[count:], offset + count

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _size_bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
