"""GPTQ directories as AutoGPTQ and GPTQModel write them.

The layout of a linear layer with K inputs and N outputs, in b bits, after the packing code of
AutoGPTQ (auto_gptq/nn_modules/qlinear) and GPTQModel (gptqmodel/nn_modules/qlinear):

- qweight: i32[K b / 32, N]: 32 / b inputs to a word, the first in its lowest bits.
- scales: f16[G, N], of G groups of inputs.
- qzeros: i32[G, N b / 32]: 32 / b outputs to a word. In the format "gptq" a zero point is stored
  less one, modulo 2^b; in "gptq_v2" as it is.
- g_idx: i32[K]: the group of each input. With desc_act they are in no order; without it the tensor
  may be missing.

A weight is scale * (code - zero).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ellm_jax.checkpoint.errors import CheckpointError
from ellm_jax.checkpoint.packed import Codes, Module, even_groups, unpacked


class Gptq:
    """The layout, from a quantization_config."""

    name = "GPTQ"
    key = "qweight"
    suffixes: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, raw: Mapping[str, Any]):
        """Raises CheckpointError, naming the field, for what is not read."""
        if raw.get("bits") not in (4, 8):
            raise _unsupported("bits", raw.get("bits"), "4 and 8")
        self._bits = int(raw["bits"])
        if raw.get("is_marlin_format"):
            raise _unsupported("is_marlin_format", True, "False")
        stored = raw.get("checkpoint_format") or raw.get("format") or "gptq"
        if stored not in ("gptq", "gptq_v2"):
            raise _unsupported("checkpoint_format", stored, "gptq and gptq_v2")
        if raw.get("pack_dtype", "int32") != "int32":
            raise _unsupported("pack_dtype", raw["pack_dtype"], "int32")
        # Keys that begin with "-" name modules that are not quantised; others change how.
        changed = [key for key in raw.get("dynamic") or {} if not str(key).startswith("-")]
        if changed:
            raise _unsupported("dynamic", changed, "modules that are left out (-:...)")
        self._stored_less = 1 if stored == "gptq" else 0
        self._has_order = bool(raw.get("desc_act"))

    def shape(self, module: Module) -> tuple[int, int]:
        """See `Layout.shape`."""
        rows, outputs = module.shape("qweight")
        return outputs, rows * 32 // self._bits

    def codes(self, module: Module, whole: bool) -> Codes:
        """See `Layout.codes`."""
        outputs, inputs = self.shape(module)
        groups = module.shape("scales")[0]
        module.check(
            module.shape("scales") == (groups, outputs)
            and module.shape("qzeros") == (groups, outputs * self._bits // 32),
            *self.suffixes,
        )
        if not self._has_order and not module.has("g_idx"):
            order = even_groups(module, inputs, groups, *self.suffixes)
        else:
            order = module.read("g_idx").astype(np.int64)
            fits = order.shape == (inputs,) and order.min() >= 0 and order.max() < groups
            module.check(fits, *self.suffixes)
        zeros = unpacked(module.read("qzeros"), self._bits, 1) + np.uint8(self._stored_less)
        codes = np.empty((0, inputs), np.uint8)
        if whole:
            codes = unpacked(module.read("qweight"), self._bits, 0).T
        return Codes(
            self._bits,
            np.ascontiguousarray(codes),
            np.ascontiguousarray(module.read("scales").T.astype(np.float32)),
            np.ascontiguousarray((zeros & np.uint8(2**self._bits - 1)).T),
            order,
        )


def _unsupported(field: str, value: object, supported: str) -> CheckpointError:
    return CheckpointError(
        f"{field}={value!r} in the quantization_config of a GPTQ model is not supported; "
        f"supported: {supported}. Use another checkpoint of the model, or one that is not "
        'quantised with quantization="int4".'
    )
