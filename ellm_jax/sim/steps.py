"""Compiled steps that nobody compiled: which there are, and what they need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from ellm_jax.runtime.buckets import Buckets
from ellm_jax.runtime.shapes import StepKey, StepMode, StepShape
from ellm_jax.sim.clock import FakeClock


@dataclass(frozen=True)
class NeedModel:
    """What a step takes beyond its arguments, as a line over its bucket.

    Attributes:
        fixed_bytes: of any step.
        row_bytes: per token row.
        seq_bytes: per sequence.
    """

    fixed_bytes: int
    row_bytes: int
    seq_bytes: int

    def need_bytes(self, shape: StepShape) -> int:
        """Of one bucket."""
        return self.fixed_bytes + self.row_bytes * shape.rows + self.seq_bytes * shape.seqs

    @classmethod
    def fit(cls, measured: Mapping[StepShape, int]) -> NeedModel:
        """The line through what buckets were found to need, by least squares; where that has a
        part below 0, that part is left out."""
        shapes = list(measured)
        columns = np.array([[1.0, s.rows, s.seqs] for s in shapes])
        needs = np.array([float(measured[s]) for s in shapes])
        used = [0, 1, 2]
        while used:
            # Relative errors: a small step's need matters as much as a large one's.
            solution = np.linalg.lstsq(columns[:, used] / needs[:, None], np.ones(len(needs)))[0]
            if min(solution) >= 0:
                break
            used.pop(int(np.argmin(solution)))
        line = [0, 0, 0]
        for index, value in zip(used, solution if used else (), strict=True):
            line[index] = round(value)
        return cls(*line)

    def to_dict(self) -> dict[str, int]:
        """For a file."""
        return asdict(self)


class SimSteps:
    """Stands for the step compiler. Without `compile_s` every step is there from the start; with
    it, those that an engine warms up, and others after so many seconds.

    Attributes:
        waited_s: seconds that `ensure` has let pass.
    """

    def __init__(
        self,
        clock: FakeClock,
        buckets: Buckets,
        need: NeedModel,
        compile_s: float = 0.0,
    ):
        """Takes the clock, the buckets, what they need, and how long one takes to compile."""
        self._clock = clock
        self._buckets = buckets
        self._need = need
        self._compile_s = compile_s
        self._compiled = {StepKey(shape, StepMode()) for shape in buckets.common()}
        self._pending: dict[StepKey, float] = {}
        self.waited_s = 0.0

    def collect(self) -> None:
        """Takes over what was compiled meanwhile."""
        for key in [k for k, ready_s in self._pending.items() if ready_s <= self._clock()]:
            del self._pending[key]
            self._compiled.add(key)

    def choose(self, rows: int, seqs: int, mode: StepMode) -> StepKey:
        """The exact step if it is compiled, else the smallest that covers it."""
        exact = StepKey(self._buckets.fit(rows, seqs), mode)
        if not self._compile_s or exact in self._compiled:
            return exact
        covering = [
            key
            for key in self._compiled
            if key.mode == mode and key.shape.rows >= rows and key.shape.seqs >= seqs
        ]
        return min(covering, key=lambda k: (k.shape.rows, k.shape.seqs), default=exact)

    def ensure(self, key: StepKey) -> int:
        """What the step needs; lets the time pass that compiling it takes."""
        if self._compile_s and key not in self._compiled:
            self._clock.pass_time(self._compile_s)
            self.waited_s += self._compile_s
            self._compiled.add(key)
        return self._need.need_bytes(key.shape)

    def refine(self, rows: int, seqs: int, mode: StepMode) -> None:
        """Has the exact step compiled in the background."""
        key = StepKey(self._buckets.fit(rows, seqs), mode)
        if self._compile_s and key not in self._compiled:
            self._pending.setdefault(key, self._clock() + self._compile_s)

    def prepare(self, mode: StepMode) -> None:
        """Nobody waits for steps of another mode."""

    def need_bytes(self, rows: int, seqs: int, mode: StepMode, exact: bool) -> int:
        """What the step needs that `choose` gives; of the exact one if so asked."""
        if exact:
            return self.ensure(StepKey(self._buckets.fit(rows, seqs), mode))
        return self.ensure(self.choose(rows, seqs, mode))

    def close(self) -> None:
        """Nothing is left to end."""
