"""How the matrices of a decoder are held where that is not row by row in the dtype of the
computation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

PANEL_OUTPUTS = 16
"""Outputs whose 4-bit weights lie together."""
WIDE_PANEL_OUTPUTS = 64
"""The same of bfloat16 and int8."""


@dataclass(frozen=True)
class Format:
    """How a matrix `[N, K]` is held.

    Attributes:
        bits: 16: bfloat16, `[N, K]`. 8: `i8[N, K]`, and a float32 scale per output. 4: steps from 0
            to 15, packed two to a byte in panels of `PANEL_OUTPUTS` outputs,
            `u8[N / 16, K / group, 8 group]`, and a float16 scale per output and group,
            `f16[N / 16, K / group, 16]`. What does not divide is rounded up.
        group: with 4 bits, 32 or 128: inputs that share a scale.
        zeros: with 4 bits: whether groups have zero points, held like the scales as `u8`; else the
            zero point is 8.
        panels: with 16 or 8 bits: whether values lie in panels of `WIDE_PANEL_OUTPUTS` outputs,
            fewer in the last one: four bytes of inputs after four, and of these output after
            output. The array is called `[N, K]` all the same; K is a multiple of 2 or 4.
    """

    bits: int
    group: int = 0
    zeros: bool = False
    panels: bool = False


@dataclass(frozen=True)
class Quantization:
    """How all matrices of a decoder are held; None where it is in the dtype of the computation.

    Attributes:
        name: for people.
        blocks: the matrices of the layers.
        head: the output head, which is then held beside the embedding.
        by_turns: of the matrix of gates and ups, which is in panels: whether each panel is half
            gates, half ups, instead of all gates coming first; its scales and its bias follow it.
            Then what it computes can be gated before it is stored (`Finish`).
    """

    name: str
    blocks: Format | None
    head: Format | None
    by_turns: bool = False

    def format_of(self, param: str) -> Format | None:
        """Of a matrix by its dotted name; None of everything else."""
        if param == "lm_head":
            return self.head
        return self.blocks if param in _MATRICES else None


_MATRICES = ("blocks.qkv", "blocks.o", "blocks.gate_up", "blocks.down")
_INT8 = Format(8)
# The head stays in 8 bits: it is where the model's opinions are read, and a small part of it.
NAMED: Mapping[str, Quantization] = MappingProxyType(
    {
        "int8": Quantization("int8", _INT8, _INT8),
        "int4": Quantization("int4", Format(4, 32), _INT8),
        "int4-g128": Quantization("int4-g128", Format(4, 128), _INT8),
    }
)
"""What a user may ask for."""


def quantization_of(asked: str | Quantization | None) -> Quantization:
    """What a name of `NAMED` stands for; with None nothing is quantised."""
    if isinstance(asked, Quantization):
        return asked
    return Quantization("none", None, None) if asked is None else NAMED[asked]
