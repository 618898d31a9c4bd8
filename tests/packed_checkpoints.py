"""Quantised checkpoints as others publish them, packed bit by bit from the formats' descriptions:
nothing here is shared with the code that reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hf_checkpoints
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Quantised:
    """A matrix `[N, K]` in integers: weight = scale * (code - zero).

    Attributes:
        bits: 4 or 8.
        codes: `[N, K]`, from 0 to 2^bits - 1.
        scales: `[N, G]`, float16.
        zeros: `[N, G]`.
        groups: `[K]`, the group of each input.
    """

    bits: int
    codes: NDArray[np.int64]
    scales: NDArray[np.float16]
    zeros: NDArray[np.int64]
    groups: NDArray[np.int64]

    def dense(self) -> NDArray[np.float64]:
        """The weights."""
        steps = self.codes - self.zeros[:, self.groups]
        return steps * self.scales.astype(np.float64)[:, self.groups]


def quantise(
    weights: NDArray[np.float32],
    bits: int,
    group: int,
    symmetric: bool,
    order: NDArray[np.int64] | None = None,
) -> Quantised:
    """Rounds to the nearest; `group` 0 is a whole row. `order` says which inputs group together."""
    outputs, inputs = weights.shape
    size = group or inputs
    groups = np.arange(inputs) // size
    if order is not None:
        groups = groups[np.argsort(order)]
    count = int(groups.max()) + 1
    top = 2**bits - 1
    scales = np.zeros((outputs, count), np.float16)
    zeros = np.full((outputs, count), (top + 1) // 2)
    for g in range(count):
        block = weights[:, groups == g].astype(np.float64)
        if symmetric:
            scales[:, g] = np.abs(block).max(axis=1) / (top // 2)
        else:
            low, high = np.minimum(block.min(axis=1), 0), np.maximum(block.max(axis=1), 0)
            scales[:, g] = (high - low) / top
            zeros[:, g] = np.clip(np.rint(-low / scales[:, g].astype(np.float64)), 0, top)
    steps = np.rint(weights / scales.astype(np.float64)[:, groups]) + zeros[:, groups]
    return Quantised(bits, np.clip(steps, 0, top).astype(np.int64), scales, zeros, groups)


def packed(codes: NDArray[np.int64], bits: int, order: tuple[int, ...] | None = None) -> Any:
    """`[rows, n]` codes to `[rows, n bits / 32]` int32; `order` names, from the lowest bits on, the
    codes of a word. What is missing in the last word is zero."""
    per_word = 32 // bits
    rows, n = codes.shape
    words = np.zeros((rows, -(-n // per_word)), np.int64)
    for word in range(words.shape[1]):
        for place, code in enumerate(order or range(per_word)):
            at = word * per_word + code
            if at < n:
                words[:, word] += codes[:, at] << (bits * place)
    return words.astype(np.uint32).view(np.int32)


def gptq(q: Quantised, module: str, version: int = 1) -> dict[str, Any]:
    """AutoGPTQ's tensors: inputs along the words of qweight, outputs along those of qzeros."""
    stored = (q.zeros - (1 if version == 1 else 0)) % 2**q.bits
    return {
        f"{module}.qweight": np.ascontiguousarray(packed(q.codes, q.bits).T),
        f"{module}.qzeros": packed(stored.T, q.bits),
        f"{module}.scales": np.ascontiguousarray(q.scales.T),
        f"{module}.g_idx": q.groups.astype(np.int32),
    }


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def awq(q: Quantised, module: str) -> dict[str, Any]:
    """AutoAWQ's tensors of its gemm layout: outputs along the words, interleaved."""
    return {
        f"{module}.qweight": packed(q.codes.T, 4, AWQ_ORDER),
        f"{module}.qzeros": packed(q.zeros.T, 4, AWQ_ORDER),
        f"{module}.scales": np.ascontiguousarray(q.scales.T),
    }


def pack_quantized(q: Quantised, module: str) -> dict[str, Any]:
    """The tensors of compressed-tensors' "pack-quantized"."""
    tensors = {
        f"{module}.weight_packed": packed(q.codes, q.bits),
        f"{module}.weight_scale": q.scales,
        f"{module}.weight_shape": np.array(q.codes.shape, np.int64),
    }
    if (q.zeros != 2 ** (q.bits - 1)).any():
        # Packed along the outputs.
        words = np.ascontiguousarray(packed(q.zeros.T, q.bits).T)
        tensors[f"{module}.weight_zero_point"] = words
    return tensors


def int_quantized(q: Quantised, module: str) -> dict[str, Any]:
    """The tensors of compressed-tensors' "int-quantized"."""
    tensors = {
        f"{module}.weight": (q.codes - 128).astype(np.int8),
        f"{module}.weight_scale": q.scales,
    }
    if (q.zeros != 128).any():
        tensors[f"{module}.weight_zero_point"] = (q.zeros - 128).astype(np.int8)
    return tensors


def compressed_config(form: str, bits: int, group: int, symmetric: bool) -> dict[str, Any]:
    """A quantization_config of compressed-tensors."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if group else "channel",
        "group_size": group or None,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def make_packed(
    path: Path,
    name: str,
    settings: dict[str, Any],
    pack: Callable[[Quantised, str], dict[str, Any]],
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    shuffled: bool = False,
    shards: int = 1,
) -> tuple[Path, dict[str, NDArray[np.float64]]]:
    """Writes `CASES[name]` with the matrices of its layers quantised; returns its directory and, by
    name, the weights that it stands for."""
    case = hf_checkpoints.CASES[name]
    config = hf_checkpoints.config_dict(case) | {"quantization_config": settings}
    stored: dict[str, NDArray[Any]] = {}
    dense: dict[str, NDArray[np.float64]] = {}
    for tensor, weights in hf_checkpoints.make_weights(config, case.seed).items():
        if "proj.weight" not in tensor:
            stored[tensor] = weights
            dense[tensor] = weights.astype(np.float64)
            continue
        order = np.random.default_rng(len(stored)).permutation(weights.shape[1])
        q = quantise(weights, bits, group, symmetric, order if shuffled else None)
        stored |= pack(q, tensor.removesuffix(".weight"))
        dense[tensor] = q.dense()
    return hf_checkpoints.write_checkpoint(path, config, stored, shards), dense
