"""A step as it is planned: who gets how many of its tokens, and whether that fits the memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ellm_jax.config import format_bytes
from ellm_jax.memory.ledger import Ledger
from ellm_jax.request import Request
from ellm_jax.runtime.shapes import StepMode
from ellm_jax.scheduler.cost import CostModel, StepWork, prefill_pairs

NeedBytes = Callable[[int, int, StepMode, bool], int]
"""(token rows, sequences, mode, exact) -> what such a step takes beyond its arguments. With `exact`
of the smallest bucket, even if that has to be compiled first."""

_PLAIN, _MASKED = StepMode(), StepMode(masked=True)


@dataclass(slots=True)
class Share:
    """What a request gets of a step.

    Attributes:
        request: who.
        begin: first token to compute.
        count: how many.
        samples: whether the last of them yields a new token.
    """

    request: Request
    begin: int
    count: int
    samples: bool

    @property
    def mode(self) -> StepMode:
        """What the step has to report for it."""
        masked = self.samples and self.request.matcher is not None
        if not self.request.wants_logprobs:
            return _MASKED if masked else _PLAIN
        params = self.request.params
        rest_of_prompt = self.begin + 1 < len(self.request.prompt_ids)
        return StepMode(
            logprobs=self.samples and params.logprobs is not None,
            prompt_logprobs=rest_of_prompt and self.request.wants_prompt_logprobs,
            masked=masked,
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """A step to run.

    Attributes:
        shares: one per request, at least one.
        mode: what the step reports.
        rows: tokens of all shares.
        work: what it costs.
    """

    shares: tuple[Share, ...]
    mode: StepMode
    rows: int
    work: StepWork


class MemoryPressure(Exception):
    """The requests that run cannot all go on with the memory there is: one has to make room."""


@dataclass(slots=True)
class Draft:
    """A plan in the making: what it holds so far, and what may still be added.

    Attributes:
        room_bytes: what need and chunks may take together.
        max_rows: most tokens.
        floor_bytes: what activations hold at all times.
        whole: prompts come in one piece.
        exact: count with the smallest bucket.
        budget_s: how long the step may take beside its decodes; None: any time.
        least_rows: tokens of a prompt that a step may take however short the time is.
    """

    ledger: Ledger
    need_bytes: NeedBytes
    rows_below: Callable[[int], int | None]
    cost: CostModel
    room_bytes: int
    max_rows: int
    floor_bytes: int = 0
    whole: bool = False
    exact: bool = False
    budget_s: float | None = None
    least_rows: int = 1
    shares: list[Share] = field(default_factory=list)
    mode: StepMode = _PLAIN
    rows: int = 0
    chunks: int = 0
    prefill_pairs: int = 0
    decode_pairs: int = 0
    suspect: bool = False

    def need(self, rows: int, seqs: int, mode: StepMode) -> int:
        """What activations hold during such a step."""
        return max(self.floor_bytes, self.need_bytes(rows, seqs, mode, self.exact))

    @property
    def fits_now(self) -> bool:
        """Whether what is in it fits the memory."""
        need = self.need(self.rows, len(self.shares), self.mode)
        return self.chunks * self.ledger.chunk_bytes + need <= self.room_bytes

    def fits(self, share: Share) -> bool:
        """Whether the step with this share too fits the memory."""
        need = self.need(self.rows + share.count, len(self.shares) + 1, self.mode | share.mode)
        taken = (self.chunks + self._missing(share)) * self.ledger.chunk_bytes
        return taken + need <= self.room_bytes

    def add(self, share: Share) -> None:
        """Takes a share in."""
        request, count = share.request, share.count
        self.chunks += self._missing(share)
        self.rows += count
        if request.wants_logprobs or request.matcher is not None:
            self.mode |= share.mode
        if request.num_failures:
            self.suspect = True
        if count == 1:
            self.decode_pairs += share.begin + 1
        else:
            self.prefill_pairs += prefill_pairs(share.begin, count)
        self.shares.append(share)

    def add_decodes(self, running: Iterable[Request]) -> None:
        """Takes in the next token of each that decodes and that there is room for: `open_to` and
        `add` in a loop of few calls, for it is most of what planning a step takes."""
        shares, missing_chunks = self.shares, self.ledger.missing_chunks
        left = self.max_rows - self.rows
        chunks = pairs = 0
        for request in running:
            if not request.decodes:
                continue
            if left == 0:
                break
            if request.num_failures:
                if self.suspect:
                    continue
                self.suspect = True
            begin, slot = request.computed, request.slot
            assert slot is not None
            share = Share(request, begin, 1, True)
            if request.wants_logprobs or request.matcher is not None:
                self.mode |= share.mode
            shares.append(share)
            left -= 1
            chunks += missing_chunks(slot, begin + 1)
            pairs += begin + 1
        self.rows = self.max_rows - left
        self.chunks += chunks
        self.decode_pairs += pairs

    def largest_share(self, request: Request) -> Share | None:
        """The largest piece of what a request has to compute that fits memory and time; None if
        none does."""
        remaining = request.remaining
        count = min(remaining, self.max_rows - self.rows)
        if self.budget_s is not None:
            count = min(count, self._rows_in_time(request.computed))
        if self.whole and count < remaining:
            return None
        while count > 0:
            share = Share(request, request.computed, count, samples=count == remaining)
            if self.fits(share):
                return share
            smaller = None if self.whole else self.rows_below(self.rows + count)
            count = 0 if smaller is None else smaller - self.rows
        return None

    def _rows_in_time(self, begin: int) -> int:
        assert self.budget_s is not None
        rows = self.cost.largest_rows(self.budget_s, begin, self.work)
        # The first prompt goes on in any case, or it would never end.
        return rows if self.prefill_pairs else max(rows, self.least_rows)

    @property
    def work(self) -> StepWork:
        """What it costs so far."""
        return StepWork(self.rows, self.prefill_pairs, self.decode_pairs)

    def open_to(self, request: Request) -> bool:
        """Whether there is room for a row, and no second suspect of a failed step comes in."""
        return self.rows < self.max_rows and not (self.suspect and request.num_failures)

    def plan(self) -> Plan | None:
        """The step; None where nothing is in it."""
        if not self.shares:
            return None
        return Plan(tuple(self.shares), self.mode, self.rows, self.work)

    def pressure(self, extra: Share | None = None) -> MemoryPressure:
        """Says what does not fit: what is in it, with `extra`."""
        rows, seqs, mode, chunks = self.rows, len(self.shares), self.mode, self.chunks
        if extra is not None:
            rows, seqs, mode = rows + extra.count, seqs + 1, mode | extra.mode
            chunks += self._missing(extra)
        return MemoryPressure(
            f"a step of {rows} tokens needs {format_bytes(self.need(rows, seqs, mode))} beside "
            f"{format_bytes(chunks * self.ledger.chunk_bytes)} of KV cache, and "
            f"{format_bytes(self.room_bytes)} are free; raise device_memory"
        )

    def _missing(self, share: Share) -> int:
        slot = share.request.slot
        assert slot is not None
        return self.ledger.missing_chunks(slot, share.begin + share.count)
