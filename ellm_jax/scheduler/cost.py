"""How long a step will take, learned from those that were run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

_COEFFICIENTS = ("fixed_s", "row_s", "prefill_pair_s", "decode_pair_s")
_MOST_ROWS = 2**31 - 1

# Steps whose median says how fast the machine is, before the coefficients are told apart.
_FIRST_STEPS = 9
# Of the filter that learns. Errors are relative to the prediction, coefficients to the prior.
_PRIOR_VARIANCE = 1.0
_DRIFT = 0.01  # how far a coefficient may wander in a step, relative to itself
_NOISE = 0.05  # what the time of equal steps varies by
_SPREAD_START = 1.0
_SPREAD_FACTOR = 1.25
_OUTLIER_SPREADS = 4.0
_FACTOR_MIN = 1e-6
_COPY_GAIN = 0.1
_COPY_OUTLIER = 1.0  # in units of e


def prefill_pairs(begin: int, count: int) -> int:
    """Pairs of a query and a context token, itself included, when `count` tokens are computed
    behind the `begin` that are there."""
    return count * begin + count * (count + 1) // 2


@dataclass(frozen=True)
class StepWork:
    """What a step has to do.

    Attributes:
        rows: tokens that go through the layers.
        prefill_pairs: pairs of query and context token of the pieces of prompts.
        decode_pairs: the same of the requests that compute one token.
    """

    rows: int = 0
    prefill_pairs: int = 0
    decode_pairs: int = 0

    def __add__(self, other: StepWork) -> StepWork:
        """Both in one step."""
        return StepWork(
            self.rows + other.rows,
            self.prefill_pairs + other.prefill_pairs,
            self.decode_pairs + other.decode_pairs,
        )

    @classmethod
    def prefill(cls, begin: int, count: int) -> StepWork:
        """A piece of a prompt: tokens [begin, begin + count)."""
        return cls(count, prefill_pairs(begin, count), 0)

    @classmethod
    def decode(cls, context: int) -> StepWork:
        """One token of a request, which attends to `context` tokens, itself included."""
        return cls(1, 0, context)


class CostModel:
    """The time of a step as a line: fixed + rows + pairs of prefill + pairs of decode.

    The first steps say only how fast the machine is against the prior. Then a Kalman filter tells
    the four coefficients apart: least squares in which what was learned about one kind of work
    stays while only another kind is seen, and which yet follows a machine that changes.
    Coefficients stay above 0. A step that takes far longer than its like usually vary (something
    was compiled, the machine was paused) counts only as far as they do. Pure Python, some 15
    microseconds per step.

    Attributes:
        fixed_s: of any step.
        row_s: per token that goes through the layers.
        prefill_pair_s: per pair of query and context token of a prompt's piece.
        decode_pair_s: per context token of a decode.
        copy_bytes_per_s: between the device and the host tier.
    """

    def __init__(
        self,
        fixed_s: float = 1e-3,
        row_s: float = 1e-4,
        prefill_pair_s: float = 1e-7,
        decode_pair_s: float = 1e-7,
        copy_bytes_per_s: float = 4e9,
    ):
        """Takes the prior: what is believed before the first step.

        Raises:
            ValueError: a coefficient is not above 0.
        """
        self.fixed_s = fixed_s
        self.row_s = row_s
        self.prefill_pair_s = prefill_pair_s
        self.decode_pair_s = decode_pair_s
        self.copy_bytes_per_s = copy_bytes_per_s
        self._prior = (fixed_s, row_s, prefill_pair_s, decode_pair_s)
        for name, value in zip(
            (*_COEFFICIENTS, "copy_bytes_per_s"), (*self._prior, copy_bytes_per_s), strict=True
        ):
            if not 0 < value < math.inf:
                raise ValueError(f"{name}={value!r}: must be above 0")
        self._factors = [1.0] * len(self._prior)
        self._variance = [
            [_PRIOR_VARIANCE * (i == j) for j in range(len(self._prior))]
            for i in range(len(self._prior))
        ]
        self._spread = _SPREAD_START
        self._first_ratios: list[float] = []

    def step_s(self, work: StepWork) -> float:
        """Seconds that a step takes."""
        return (
            self.fixed_s
            + self.row_s * work.rows
            + self.prefill_pair_s * work.prefill_pairs
            + self.decode_pair_s * work.decode_pairs
        )

    def prefill_s(self, begin: int, tokens: int) -> float:
        """Seconds that computing `tokens` tokens behind the first `begin` takes in one step."""
        return self.step_s(StepWork.prefill(begin, tokens))

    def largest_rows(self, budget_s: float, begin: int, base: StepWork) -> int:
        """Most tokens from `begin` on that a step can compute beside `base` within a time.

        At least 0; 2**31 - 1 where time sets no limit.
        """
        room_s = budget_s - self.step_s(base)
        if not room_s > 0:
            return 0
        # room = linear * n + square * n * n, from rows and n * begin + n * (n + 1) / 2 pairs.
        square = self.prefill_pair_s / 2
        linear = self.row_s + self.prefill_pair_s * (begin + 0.5)
        if room_s == math.inf:
            return _MOST_ROWS
        # The root in the form that loses nothing when `square` is small or 0.
        root = 2 * room_s / (linear + math.sqrt(linear * linear + 4 * square * room_s))
        return int(min(root, _MOST_ROWS))

    def copy_s(self, size_bytes: int) -> float:
        """Seconds that a copy between the tiers takes."""
        return size_bytes / self.copy_bytes_per_s

    def observe(self, work: StepWork, seconds: float) -> None:
        """Learns from a step that took so long."""
        expected_s = self.step_s(work)
        if not 0 < seconds < math.inf or expected_s <= 0:
            return
        if len(self._first_ratios) < _FIRST_STEPS:
            known_s = expected_s / self._factors[0]
            self._first_ratios.append(seconds / known_s)
            self._become([statistics.median(self._first_ratios)] * len(self._prior))
            if len(self._first_ratios) == _FIRST_STEPS:
                self._prior = (self.fixed_s, self.row_s, self.prefill_pair_s, self.decode_pair_s)
                self._factors = [1.0] * len(self._prior)
            return
        error = seconds / expected_s - 1
        far = _OUTLIER_SPREADS * self._spread
        # It follows the median of the errors: up as often as down.
        self._spread *= _SPREAD_FACTOR if abs(error) > self._spread else 1 / _SPREAD_FACTOR
        self._spread = max(self._spread, _NOISE)
        self._correct(self._shares(work, expected_s), max(-far, min(far, error)))

    def observe_copy(self, size_bytes: int, seconds: float) -> None:
        """Learns from a copy that took so long."""
        if size_bytes <= 0 or not 0 < seconds < math.inf:
            return
        change = math.log(size_bytes / seconds / self.copy_bytes_per_s)
        change = max(-_COPY_OUTLIER, min(_COPY_OUTLIER, change))
        self.copy_bytes_per_s *= math.exp(_COPY_GAIN * change)

    def to_dict(self) -> dict[str, float]:
        """The coefficients as they are now, for a file."""
        names = (*_COEFFICIENTS, "copy_bytes_per_s")
        return {name: float(getattr(self, name)) for name in names}

    @classmethod
    def from_dict(cls, values: Mapping[str, float]) -> CostModel:
        """A model that starts from what `to_dict` gave.

        Raises:
            ValueError: a name is missing or unknown, or a value is not a number above 0.
        """
        names = (*_COEFFICIENTS, "copy_bytes_per_s")
        if set(values) != set(names):
            raise ValueError(
                f"a cost model has {', '.join(names)}; these are {', '.join(map(str, values))}"
            )
        for name, value in values.items():
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise ValueError(f"{name}={value!r}: must be a number above 0")
        return cls(**values)

    def _shares(self, work: StepWork, expected_s: float) -> list[float]:
        """How much of the expected time a factor of 1 on each coefficient stands for."""
        amounts = (1, work.rows, work.prefill_pairs, work.decode_pairs)
        return [p * x / expected_s for p, x in zip(self._prior, amounts, strict=True)]

    def _correct(self, shares: list[float], error: float) -> None:
        """One step of the filter; a coefficient that would fall below 0 is as good as 0 then."""
        variance, factors = self._variance, self._factors
        for i, factor in enumerate(factors):
            if variance[i][i] < _PRIOR_VARIANCE * max(1.0, factor * factor):
                variance[i][i] += (_DRIFT * max(factor, 0.1)) ** 2
        spread = [sum(v * s for v, s in zip(row, shares, strict=True)) for row in variance]
        total = _NOISE**2 + sum(a * s for a, s in zip(spread, shares, strict=True))
        for i, a in enumerate(spread):
            factors[i] = max(_FACTOR_MIN, factors[i] + a / total * error)
            for j, b in enumerate(spread):
                variance[i][j] -= a * b / total
        self._become(factors)

    def _become(self, factors: list[float]) -> None:
        self._factors = factors
        for name, prior, factor in zip(_COEFFICIENTS, self._prior, factors, strict=True):
            setattr(self, name, prior * factor)
