"""AWQ directories as AutoAWQ writes them, in its "gemm" layout.

The layout of a linear layer with K inputs and N outputs, in 4 bits, after the packing code of
AutoAWQ (awq/modules/linear/gemm.py):

- qweight: i32[K, N / 8]: eight outputs to a word, interleaved: from the lowest bits on those with
  the numbers 0, 2, 4, 6, 1, 3, 5, 7.
- scales: f16[G, N], of G groups of neighbouring inputs.
- qzeros: i32[G, N / 8], packed like qweight; zero points as they are.

A weight is scale * (code - zero).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ellm_jax.checkpoint.errors import CheckpointError
from ellm_jax.checkpoint.packed import Codes, Module, even_groups, unpacked

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Awq:
    """The layout, from a quantization_config."""

    name = "AWQ"
    key = "qweight"
    suffixes: tuple[str, ...] = ("qweight", "qzeros", "scales")

    def __init__(self, raw: Mapping[str, Any]):
        """Raises CheckpointError, naming the field, for what is not read."""
        version = raw.get("version") or raw.get("checkpoint_format") or "gemm"
        supported: dict[str, tuple[Any, str]] = {
            "bits": (raw.get("bits", raw.get("w_bit", 4)), "4"),
            "version": (str(version).lower(), "gemm"),
            "zero_point": (raw.get("zero_point", True), "True"),
        }
        for field, (value, only) in supported.items():
            if str(value) != only:
                raise CheckpointError(
                    f"{field}={value!r} in the quantization_config of an AWQ model is not "
                    f"supported; supported: {only}. Use another checkpoint of the model, or one "
                    'that is not quantised with quantization="int4".'
                )

    def shape(self, module: Module) -> tuple[int, int]:
        """See `Layout.shape`."""
        inputs, words = module.shape("qweight")
        return words * 8, inputs

    def codes(self, module: Module, whole: bool) -> Codes:
        """See `Layout.codes`."""
        outputs, inputs = self.shape(module)
        groups = module.shape("scales")[0]
        module.check(
            module.shape("scales") == (groups, outputs)
            and module.shape("qzeros") == (groups, outputs // 8),
            *self.suffixes,
        )
        return Codes(
            4,
            _in_order(module.read("qweight")) if whole else np.empty((0, inputs), np.uint8),
            np.ascontiguousarray(module.read("scales").T.astype(np.float32)),
            _in_order(module.read("qzeros")),
            even_groups(module, inputs, groups, *self.suffixes),
        )


def _in_order(words: NDArray[np.int32]) -> NDArray[np.uint8]:
    """`[rows, N / 8]` words to `[N, rows]` codes."""
    rows = len(words)
    stored = unpacked(words, 4, 1).reshape(rows, -1, 8)
    codes = np.empty_like(stored)
    codes[:, :, _ORDER] = stored
    return np.ascontiguousarray(codes.reshape(rows, -1).T)
