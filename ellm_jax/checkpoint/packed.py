"""Matrices that a checkpoint stores quantised, and a view of its files that hides it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ellm_jax.checkpoint.errors import CheckpointError
from ellm_jax.checkpoint.safetensors_file import DTYPES, SafetensorsFile, StoredTensor

INTEGERS: dict[str, np.dtype[Any]] = {
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
"""What packed weights are stored in."""


@dataclass(frozen=True)
class PackedTensor(StoredTensor):
    """A matrix that is dequantised as it is read.

    Attributes:
        name: under which it is found.
    """

    name: str


@dataclass(frozen=True)
class Codes:
    """A quantised matrix: weight = scale * (code - zero).

    Attributes:
        bits: 4 or 8.
        codes: `[N, K]`, from 0 to 2^bits - 1.
        scales: `[N, G]`.
        zeros: `[N, G]`, like codes.
        groups: `[K]`, which of the G groups each input is of.
    """

    bits: int
    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zeros: NDArray[np.uint8]
    groups: NDArray[np.int64]

    def dense(self, rows: slice) -> NDArray[np.float32]:
        """The weights of these outputs, `[rows, K]`."""
        steps = self.codes[rows].astype(np.float32)
        steps -= self.zeros[rows].astype(np.float32)[:, self.groups]
        steps *= self.scales[rows][:, self.groups]
        return steps

    def group(self) -> int | None:
        """Inputs that share a scale, where they are neighbours; else None."""
        size = int(np.count_nonzero(self.groups == self.groups[0]))
        in_order = np.arange(len(self.groups)) // size
        return size if np.array_equal(self.groups, in_order) else None


class Module:
    """The tensors of one quantised matrix, by suffix."""

    def __init__(self, name: str, source: Mapping[str, SafetensorsFile]):
        """`name` is what their names begin with, the last dot included."""
        self.name = name
        self._source = source

    def has(self, suffix: str) -> bool:
        """Whether there is such a tensor."""
        return self.name + suffix in self._source

    def shape(self, suffix: str) -> tuple[int, ...]:
        """Raises CheckpointError if there is none."""
        return self._find(suffix)[1].shape

    def read(self, suffix: str) -> NDArray[Any]:
        """Raises CheckpointError if there is none, or it is of another kind than the formats have.

        bfloat16 comes as ml_dtypes have it.
        """
        file, tensor = self._find(suffix)
        dtype = (DTYPES | INTEGERS).get(tensor.dtype)
        if dtype is None:
            raise CheckpointError(
                f"{self.name}{suffix} in {file.path} has dtype {tensor.dtype}; supported: "
                f"{', '.join(DTYPES | INTEGERS)}. Use another checkpoint of the model."
            )
        array = np.empty(tensor.shape, dtype)
        file.read_elements(tensor, 0, array.reshape(-1))
        return array

    def check(self, fits: bool, *suffixes: str) -> None:
        """Raises CheckpointError, with the shapes of these tensors, unless they fit."""
        if not fits:
            shapes = ", ".join(f"{s} {list(self.shape(s))}" for s in suffixes if self.has(s))
            raise CheckpointError(
                f"the tensors of {self.name}* do not fit together: {shapes}. Check that "
                "config.json and the weights belong together."
            )

    def _find(self, suffix: str) -> tuple[SafetensorsFile, StoredTensor]:
        name = self.name + suffix
        if name not in self._source:
            raise CheckpointError(
                f"the weights have {self.name}* but no {name}. Complete the download."
            )
        return self._source[name], self._source[name].tensors[name]


class Layout(Protocol):
    """How a format stores a quantised matrix: as several tensors of one module.

    Attributes:
        name: of the format, for people.
        key: suffix of the integer tensor that tells a quantised matrix.
        suffixes: all that a matrix may have, the key included, and what belongs to it and is not
            needed.
    """

    name: str
    key: str
    suffixes: tuple[str, ...]

    def shape(self, module: Module) -> tuple[int, int]:
        """`(N, K)` of a matrix."""
        ...

    def codes(self, module: Module, whole: bool) -> Codes:
        """The matrix. Not `whole`: without its codes, which are not read.

        Raises:
            CheckpointError: the tensors are missing or do not fit each other.
        """
        ...


class PackedFile:
    """The quantised matrices of a checkpoint as the tensors that they stand for: "x.weight",
    float32, dequantised as they are read. The codes of one matrix are kept until the next is read.

    Attributes:
        path: of the checkpoint's directory.
        tensors: by name.
    """

    def __init__(self, source: Mapping[str, SafetensorsFile], layout: Layout):
        """Takes which file has which tensor."""
        self.path: Path = next(iter(source.values())).path.parent
        self._layout = layout
        self._source = source
        self._last: tuple[str, Codes] | None = None
        self.tensors: dict[str, StoredTensor] = {}
        for name, file in source.items():
            if name.endswith(f".{layout.key}") and file.tensors[name].dtype in INTEGERS:
                module = Module(name.removesuffix(layout.key), source)
                weight = f"{module.name}weight"
                self.tensors[weight] = PackedTensor("F32", layout.shape(module), 0, weight)

    def index(self, wanted: Collection[str]) -> dict[str, SafetensorsFile | PackedFile]:
        """Which file has which tensor, this one included. Of those that are not `wanted`, what
        quantised matrices consist of is left out, scales of the KV cache, and biases of zeros,
        which some writers add."""
        modules = [name.removesuffix("weight") for name in self.tensors]
        parts = {module + suffix for module in modules for suffix in self._layout.suffixes}
        biases = {f"{m}bias" for m in modules} & self._source.keys() - set(wanted)
        parts |= {b for b in biases if not Module(b, self._source).read("").any()}
        others = {
            name: file
            for name, file in self._source.items()
            if name not in parts and not name.endswith((".k_scale", ".v_scale"))
        }
        return {**others, **dict.fromkeys(self.tensors, self)}

    def codes(self, name: str, whole: bool = True) -> Codes:
        """One of `tensors` as it is stored. See `Layout.codes`."""
        if self._last is not None and self._last[0] == name:
            return self._last[1]
        codes = self._layout.codes(Module(name.removesuffix("weight"), self._source), whole)
        if whole:
            self._last = (name, codes)
        return codes

    def read_elements(self, tensor: StoredTensor, first: int, target: NDArray[Any]) -> None:
        """As `SafetensorsFile.read_elements`, of one of `tensors`."""
        assert isinstance(tensor, PackedTensor)
        inputs = tensor.shape[1]
        begin, end = first // inputs, -(-(first + target.size) // inputs)
        dense = self.codes(tensor.name).dense(slice(begin, end)).reshape(-1)
        at = first - begin * inputs
        target.reshape(-1)[...] = dense[at : at + target.size]


def even_groups(module: Module, inputs: int, groups: int, *suffixes: str) -> NDArray[np.int64]:
    """The group of each input where nothing says it: neighbours, as many in each. Raises
    CheckpointError, with the shapes of these tensors, where that cannot be."""
    module.check(groups > 0 and inputs % groups == 0, *suffixes)
    return np.arange(inputs) // (inputs // groups)


def unpacked(words: NDArray[np.int32], bits: int, axis: int) -> NDArray[np.uint8]:
    """Codes from int32 words, the first in the lowest bits, spread along `axis` of a matrix."""
    count = 32 // bits
    shifts = np.arange(count, dtype=np.uint32) * np.uint32(bits)
    parts = [
        (words.view(np.uint32) >> shift & np.uint32(2**bits - 1)).astype(np.uint8)
        for shift in shifts
    ]
    stacked = np.stack(parts, axis=axis + 1)
    shape = list(words.shape)
    shape[axis] *= count
    return stacked.reshape(shape)
