"""In what K and V are held."""

from __future__ import annotations

from typing import NamedTuple


class KvFormat(NamedTuple):
    """The K, or the V, of a token in a head of a layer: a row of elements.

    Attributes:
        element_bytes: of an element.
        scale_bytes: of the scale that a row is multiplied with; 0: rows have none.
    """

    element_bytes: int
    scale_bytes: int = 0


def kv_format(kv_dtype: str, dtype: str) -> KvFormat:
    """That of `EngineConfig.kv_dtype` for a model that computes in `dtype`."""
    if kv_dtype == "int8":
        return KvFormat(1, 4)
    return KvFormat(4 if dtype == "float32" else 2)
