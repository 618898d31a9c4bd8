"""Which padded shapes steps come in. Few, so that compiling is bounded."""

from __future__ import annotations

from ellm_jax.runtime.shapes import StepShape

_RATIO = 4
_FINE_RATIO = 2
_LARGE = 512
"""From here on the ratio is fine: a bucket too large by four would hold much memory for nothing."""
_LARGE_WITH_PADDING = 16
"""The same where padding is computed too."""
_SMALLEST_PREFILL = 32
_MOST_PADDING, _MOST_PADDING_ROWS = 4, 512
"""How much larger than the fitting one a step may be, by factor or by rows, whichever is more, that
is run because it is compiled, where padding is computed too."""


def _ladder(start: int, top: int, large: int) -> list[int]:
    """`start`, then times `_RATIO` each, or `_FINE_RATIO` from `large` on, with `top` last."""
    steps = []
    while start < top:
        steps.append(start)
        start *= _RATIO if start < large else _FINE_RATIO
    return [*steps, top]


class Buckets:
    """The shapes of decode steps (a row per sequence) and of steps with prefill chunks.

    Kernels that skip padding, as the CPU's do, make a coarse bucket cheap, and take any batch that
    fits it. Where they do not, as on a GPU, buckets are finer, and those of decode steps are for
    decodes alone: such a step is launched without the kernels for prompts.

    Attributes:
        max_rows: of the largest shape.
    """

    def __init__(self, max_num_seqs: int, max_batch_tokens: int, *, skips_padding: bool = True):
        """Covers every step of at most so many sequences and tokens."""
        self._skips_padding = skips_padding
        large = _LARGE if skips_padding else _LARGE_WITH_PADDING
        # Prompts beside the most sequences need a shape that is not for decodes alone.
        self.max_rows = max(max_num_seqs + (not skips_padding), max_batch_tokens)
        self._seqs = _ladder(1, max_num_seqs, large)
        self._rows = _ladder(min(_SMALLEST_PREFILL, self.max_rows), self.max_rows, large)

    def fit(self, rows: int, seqs: int) -> StepShape:
        """The smallest shape that holds so many token rows and sequences."""
        s = next(s for s in self._seqs if s >= seqs)
        if rows <= (s if self._skips_padding else seqs):
            return StepShape(s, s)
        least = max(rows, s if self._skips_padding else s + 1)
        return StepShape(next(t for t in self._rows if t >= least), s)

    def covers(self, shape: StepShape, rows: int, seqs: int) -> bool:
        """Whether a batch of so many token rows and sequences may run on a step of this shape: it
        has room for it, and wastes no more than a batch should wait for a better one."""
        if shape.rows < rows or shape.seqs < seqs:
            return False
        if self._skips_padding:
            return True
        if shape.decodes_only and rows > seqs:
            return False
        fitting = self.fit(rows, seqs).rows
        return shape.rows <= max(_MOST_PADDING * fitting, fitting + _MOST_PADDING_ROWS)

    def rows_below(self, rows: int) -> int | None:
        """The largest size under `rows` to try when a step's need does not fit: that of a smaller
        bucket, in the end a single row; None below that."""
        return max((t for t in (1, *self._rows) if t < rows), default=None)

    @property
    def smallest_prefill(self) -> int:
        """Rows of the smallest bucket that takes a piece of a prompt."""
        return self._rows[0]

    def common(self) -> list[StepShape]:
        """Shapes that cover every step, and the one that most steps have; the rest may be compiled
        while these serve."""
        most = self._seqs[-1]
        shapes = [StepShape(1, 1), StepShape(self.max_rows, 1), StepShape(self._rows[0], 1)]
        shapes += [StepShape(most, most), StepShape(self.max_rows, most)]
        if self.max_rows > _LARGE:
            shapes += [self.fit(_LARGE, 1), self.fit(max(_LARGE, most + 1), most)]
        return list(dict.fromkeys(shapes))

    def enough(self) -> list[StepShape]:
        """Shapes that every batch can run on, as few as may be."""
        most = self._seqs[-1]
        if not self._skips_padding:
            return self.common()
        return list(dict.fromkeys([StepShape(most, most), StepShape(self.max_rows, most)]))

    def every(self) -> list[StepShape]:
        """Every shape that `fit` gives."""
        sizes = (1, *self._rows)
        return list(dict.fromkeys(self.fit(rows, seqs) for seqs in self._seqs for rows in sizes))
