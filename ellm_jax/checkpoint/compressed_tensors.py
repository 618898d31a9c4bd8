"""Directories of compressed-tensors, as LLM Compressor writes them, with weights in 4 or 8 bits.

The layout of a linear layer with K inputs and N outputs, in b bits, after the compressors of the
compressed-tensors package (compressors/pack_quantized, compressors/naive_quantized):

- "pack-quantized": weight_packed: i32[N, K b / 32], 32 / b inputs to a word, the first in its
  lowest bits, each stored plus 2^(b - 1); weight_shape: [N, K]; with zero points weight_zero_point:
  i32[N b / 32, G], outputs packed alike.
- "int-quantized": weight: i8[N, K], as it is; with zero points weight_zero_point: i8[N, G].
- weight_scale: [N, G], of G groups of neighbouring inputs; one where a channel or the tensor shares
  it, then also [1] or [1, 1].
- weight_g_idx: i32[K], the group of each input, of models that were made with actorder "group".

A weight is scale * (value - zero). Scales of activations are not read: activations are quantised as
they come.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ellm_jax.checkpoint.errors import CheckpointError
from ellm_jax.checkpoint.packed import Codes, Module, even_groups, unpacked

_FORMATS = ("pack-quantized", "int-quantized")


class CompressedTensors:
    """The layout, from a quantization_config."""

    name = "compressed-tensors"

    def __init__(self, raw: Mapping[str, Any]):
        """Raises CheckpointError, naming the field, for what is not read."""
        formats = set()
        for group in _groups(raw):
            formats.add(group.get("format") or raw.get("format"))
            _check_weights(group.get("weights"))
        if len(formats) != 1 or not formats <= set(_FORMATS):
            raise _unsupported("format", ", ".join(sorted(map(str, formats))), _FORMATS)
        for field in ("transform_config", "sparsity_config"):
            settings = raw.get(field) or {}
            if settings.get("format", "dense") != "dense" or settings.get("config_groups"):
                raise _unsupported(field, settings, ("none",))
        self._packed = formats == {"pack-quantized"}
        self.key = "weight_packed" if self._packed else "weight"
        self.suffixes: tuple[str, ...] = (
            self.key,
            "weight_scale",
            "weight_zero_point",
            "weight_shape",
            "weight_g_idx",
            "input_scale",
            "input_zero_point",
        )

    def shape(self, module: Module) -> tuple[int, int]:
        """See `Layout.shape`."""
        outputs, columns = module.shape(self.key)
        if not self._packed:
            return outputs, columns
        stored = module.read("weight_shape")
        fits = stored.shape == (2,) and stored[0] == outputs
        module.check(fits and bool(_bits(columns, int(stored[1]))), *self.suffixes)
        return outputs, int(stored[1])

    def codes(self, module: Module, whole: bool) -> Codes:
        """See `Layout.codes`."""
        outputs, inputs = self.shape(module)
        bits = _bits(module.shape(self.key)[1], inputs) if self._packed else 8
        scales = module.read("weight_scale").astype(np.float32)
        scales = scales.reshape(-1, scales.shape[-1] if scales.ndim > 1 else 1)
        groups = scales.shape[1]
        module.check(len(scales) in (1, outputs), *self.suffixes)
        if not module.has("weight_g_idx") or module.read("weight_g_idx").min() < 0:  # not filled in
            order = even_groups(module, inputs, groups, *self.suffixes)
        else:
            order = module.read("weight_g_idx").astype(np.int64)
            module.check(order.shape == (inputs,) and order.max() < groups, *self.suffixes)
        codes = np.empty((0, inputs), np.uint8)
        if whole and self._packed:
            codes = unpacked(module.read(self.key), bits, 1)[:, :inputs]
        elif whole:
            codes = _plus_middle(module.read(self.key), bits)
        return Codes(
            bits,
            np.ascontiguousarray(codes),
            np.ascontiguousarray(np.broadcast_to(scales, (outputs, groups))),
            _zeros(module, bits, (outputs, groups)),
            order,
        )


def _bits(columns: int, inputs: int) -> int:
    """Of codes that are packed in so many words; 0 where it is neither 4 nor 8."""
    return next((bits for bits in (4, 8) if columns == -(-inputs * bits // 32)), 0)


def _plus_middle(values: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    moved: NDArray[np.uint8] = (values.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    return moved


def _zeros(module: Module, bits: int, shape: tuple[int, int]) -> NDArray[np.uint8]:
    if not module.has("weight_zero_point"):
        return np.full(shape, 2 ** (bits - 1), np.uint8)
    stored = module.read("weight_zero_point")
    if stored.dtype == np.int32:
        found = unpacked(stored, bits, 0)[: shape[0]]
    else:
        found = _plus_middle(stored, bits).reshape(-1, stored.shape[-1] if stored.ndim > 1 else 1)
    fits = found.shape in (shape, (1, shape[1]))
    module.check(fits, "weight_zero_point", "weight_scale")
    return np.ascontiguousarray(np.broadcast_to(found, shape))


def _groups(raw: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    groups = raw.get("config_groups") or {}
    if not groups:
        raise _unsupported("config_groups", groups, ("at least one",))
    for group in groups.values():
        if not isinstance(group, Mapping):
            raise _unsupported("config_groups", groups, ("schemes that are written out",))
        yield group


def _check_weights(weights: Any) -> None:
    if not isinstance(weights, Mapping):
        raise _unsupported("weights", weights, ("int",))
    if weights.get("type", "int") != "int":
        raise _unsupported("type", weights["type"], ("int",))
    if weights.get("num_bits") not in (4, 8):
        raise _unsupported("num_bits", weights.get("num_bits"), ("4", "8"))
    strategies = ("group", "channel", "tensor")
    if weights.get("strategy", "tensor") not in strategies:
        raise _unsupported("strategy", weights["strategy"], strategies)


def _unsupported(field: str, value: object, supported: tuple[str, ...]) -> CheckpointError:
    return CheckpointError(
        f"{field}={value!r} in the quantization_config of a compressed-tensors model is not "
        f"supported; supported: {', '.join(supported)}. Use another checkpoint of the model, or "
        'one that is not quantised with quantization="int4".'
    )
