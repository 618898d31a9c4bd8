"""Which padded shapes steps come in. Few, so that compiling is bounded: the native kernels skip
padding, which makes a coarse bucket cheap."""

from __future__ import annotations

from ellm_jax.runtime.shapes import StepShape

_RATIO = 4
_LARGE_RATIO = 2
"""From `_LARGE` on, where a bucket that is too large by four would hold much memory for nothing."""
_LARGE = 512
_SMALLEST_PREFILL = 32


def _ladder(start: int, top: int) -> list[int]:
    """`start`, then times `_RATIO` each, or less from `_LARGE` on, with `top` last."""
    steps = []
    while start < top:
        steps.append(start)
        start *= _RATIO if start < _LARGE else _LARGE_RATIO
    return [*steps, top]


class Buckets:
    """The shapes of decode steps (a row per sequence) and of steps with prefill chunks."""

    def __init__(self, max_num_seqs: int, max_batch_tokens: int):
        """Covers every step of at most so many sequences and tokens."""
        self.max_rows = max(max_num_seqs, max_batch_tokens)
        self._seqs = _ladder(1, max_num_seqs)
        self._rows = _ladder(min(_SMALLEST_PREFILL, self.max_rows), self.max_rows)

    def fit(self, rows: int, seqs: int) -> StepShape:
        """The smallest shape that holds so many token rows and sequences."""
        s = next(s for s in self._seqs if s >= seqs)
        if rows <= s:
            return StepShape(s, s)
        return StepShape(next(t for t in self._rows if t >= max(rows, s)), s)

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

    def every(self) -> list[StepShape]:
        """Every shape that `fit` gives."""
        sizes = (1, *self._rows)
        return list(dict.fromkeys(self.fit(rows, seqs) for seqs in self._seqs for rows in sizes))
