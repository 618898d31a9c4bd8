"""How a decoder is divided among devices: which part of each parameter each of them holds.

Tensor parallelism: heads, gate and up columns and the vocabulary are divided evenly. The two
matrices that close a block, `o` and `down`, take inputs that are divided and give a result that
every device needs whole. They can be divided in two ways:

- by outputs (`exact`): the inputs are gathered first and the outputs after. Every number is then
  computed on one device, as it would be without the others: the same bits.
- by inputs (Megatron-LM, arXiv 1909.08053): each device sums over the inputs that it has, and the
  sums are added. One exchange instead of two, but another order of additions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ellm_jax.models.config import ModelConfig
from ellm_jax.models.params import Shape

CLOSING = frozenset({"o", "down"})
"""The matrices of a block whose inputs are divided and whose outputs are not."""

_BY_OUTPUTS: Mapping[str, int] = MappingProxyType(
    {
        "embed": 0,
        "lm_head": 0,
        "lm_head_scale": 0,
        "lm_head_zero": 0,
        "blocks.qkv": 1,
        "blocks.qkv_bias": 1,
        "blocks.qkv_scale": 1,
        "blocks.qkv_zero": 1,
        "blocks.gate_up": 1,
        "blocks.gate_up_bias": 1,
        "blocks.gate_up_scale": 1,
        "blocks.gate_up_zero": 1,
    }
)


@dataclass(frozen=True)
class Piece:
    """A stretch of a whole parameter, and where it lies in one device's part.

    Attributes:
        axis: along which the parameter is cut.
        begin, end: in the whole parameter.
        at: where it starts in the part.
    """

    axis: int
    begin: int
    end: int
    at: int

    def within(self, rows: range) -> Piece:
        """What of it lies in these rows of the part, maybe nothing, as a piece of those rows."""
        size = self.end - self.begin
        first, last = (min(max(row - self.at, 0), size) for row in (rows.start, rows.stop))
        at = min(max(self.at - rows.start, 0), len(rows))
        return Piece(self.axis, self.begin + first, self.begin + last, at)


@dataclass(frozen=True)
class Shards:
    """A division among `count` devices; one device holds everything.

    Attributes:
        count: devices.
        exact: divide `o` and `down` by outputs, so that the results are those of one device.
    """

    count: int = 1
    exact: bool = True

    def check(self, config: ModelConfig) -> None:
        """Makes sure that the model can be divided so.

        Raises:
            ValueError: heads or widths do not divide evenly; it says which, and what does.
        """
        sizes = [
            (config.num_kv_heads, f"{config.num_kv_heads} key-value heads"),
            (config.intermediate_size, f"an intermediate size of {config.intermediate_size}"),
        ]
        if self.exact:
            sizes.append((config.hidden_size, f"a hidden size of {config.hidden_size}"))
        uneven = [text for size, text in sizes if size % self.count]
        if uneven:
            counts = range(1, config.num_kv_heads + 1)
            suited = [str(n) for n in counts if not any(size % n for size, _ in sizes)]
            raise ValueError(
                f"tensor_parallel={self.count}: the model has {' and '.join(uneven)}, which "
                f"{self.count} devices cannot share evenly; choose {' or '.join(suited)}"
            )

    def axis(self, name: str) -> int | None:
        """Along which axis a parameter is divided; None where every device has all of it."""
        if self.count == 1:
            return None
        kind = name.removeprefix("blocks.")
        if kind in CLOSING:
            return 1 if self.exact else 2
        if self.exact and kind.removesuffix("_scale").removesuffix("_zero") in CLOSING:
            return 1
        return _BY_OUTPUTS.get(name)

    def part_shape(self, name: str, whole: Shape) -> Shape:
        """The shape of one device's part of a parameter. A vocabulary that does not divide evenly
        is rounded up; the rows beyond it are zero."""
        axis = self.axis(name)
        if axis is None:
            return whole
        return (*whole[:axis], -(-whole[axis] // self.count), *whole[axis + 1 :])

    def joint_shape(self, name: str, whole: Shape) -> Shape:
        """The shape of all devices' parts behind each other."""
        axis = self.axis(name)
        if axis is None:
            return whole
        size = self.part_shape(name, whole)[axis] * self.count
        return (*whole[:axis], size, *whole[axis + 1 :])

    def pieces(self, name: str, config: ModelConfig, whole: Shape, index: int) -> Iterator[Piece]:
        """What device `index` holds of a parameter, in the order in which it lies there. Of q, k
        and v, and of gate and up, which share a matrix, each is divided on its own."""
        axis = self.axis(name)
        if axis is None:
            rows = 1 if name.startswith("blocks.") else 0
            yield Piece(rows, 0, whole[rows], 0)
            return
        start = at = 0
        for size in self._joined_sizes(name, config, whole[axis]):
            share = -(-size // self.count)
            begin, end = (min(size, i * share) for i in (index, index + 1))
            yield Piece(axis, start + begin, start + end, at)
            start += size
            at += share

    def _joined_sizes(self, name: str, config: ModelConfig, size: int) -> tuple[int, ...]:
        kind = name.removeprefix("blocks.").removesuffix("_bias")
        if kind == "qkv":
            return (config.q_size, config.kv_size, config.kv_size)
        if kind == "gate_up":
            return (config.intermediate_size,) * 2
        return (size,)


WHOLE = Shards()
"""All of it on one device."""
