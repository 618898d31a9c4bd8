"""The metadata of a step: everything the host tells the device, in one int32 array.

One array because a jitted call costs about a microsecond per argument. Floats travel as their
bits. The first four words and the spans are read by the native handlers too: they stand in
`xla_ffi/kv/step.h`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ellm_jax.runtime.sampler import SamplingInputs, neutral_inputs
from ellm_jax.runtime.shapes import StepShape

HEADER_WORDS = 8
SPAN_WORDS = 4
_NUM_SPANS, _NUM_ROWS, _DECODES_ONLY = 1, 2, 5

_SAMPLING_DTYPES = {
    name: np.asarray(array).dtype for name, array in neutral_inputs(1)._asdict().items()
}


class Span(NamedTuple):
    """One sequence's share of a step.

    Attributes:
        slot: where its KV lives.
        context_tokens: tokens already there.
        tokens: ids to compute, at least one; -1, as the last one only, stands for the token that
            the step before sampled for this slot.
        sample: whether the row of the last token yields a token.
    """

    slot: int
    context_tokens: int
    tokens: Sequence[int]
    sample: bool


class Unpacked(NamedTuple):
    """The metadata on the device, in parts.

    Attributes:
        num_rows: i32[1], token rows in use.
        num_samples: i32[1], sampled rows in use.
        tokens: i32[T]; -1 - slot: the last token sampled for that slot.
        positions: i32[T].
        targets: i32[T], the token that follows each row in its prompt; for prompt log
            probabilities.
        sample_rows: i32[S], the token row of each sampled row.
        sample_slots: i32[S], where its token is kept for the next step; out of range: nowhere.
        sampling: how to sample, [S] each.
    """

    num_rows: jax.Array
    num_samples: jax.Array
    tokens: jax.Array
    positions: jax.Array
    targets: jax.Array
    sample_rows: jax.Array
    sample_slots: jax.Array
    sampling: SamplingInputs


class StepLayout:
    """Where the parts lie in the array, for one bucket."""

    def __init__(self, shape: StepShape, num_slots: int):
        """Lays out the array; `num_slots` is the slot number that means nowhere."""
        self.shape = shape
        self._at: dict[str, slice] = {}
        end = HEADER_WORDS
        sizes = {"spans": SPAN_WORDS * shape.seqs}
        sizes |= dict.fromkeys(("tokens", "positions", "targets"), shape.rows)
        sizes |= dict.fromkeys(("sample_rows", "sample_slots", *_SAMPLING_DTYPES), shape.seqs)
        for name, size in sizes.items():
            self._at[name] = slice(end, end + size)
            end += size
        self.words = end
        # What most steps have in most places; packing starts from it.
        self._blank = np.zeros(end, np.int32)
        self._blank[self._at["sample_slots"]] = num_slots
        for name, array in neutral_inputs(shape.seqs)._asdict().items():
            self._blank[self._at[name]] = array.view(np.int32)

    def pack(
        self,
        kv_id: int,
        spans: Sequence[Span],
        sampling: SamplingInputs | None = None,
        targets: Sequence[int] | None = None,
    ) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        """Fills a fresh array (i32[words]) for the given sequences.

        Args:
            kv_id: the registry id of the KV cache.
            spans: at most S, with at most T tokens together.
            sampling: host arrays of [S] in the order of the sampled spans; None: greedy.
            targets: per token row, in the order of the spans; None: zeros.
        """
        # Plain lists first: one assignment per part costs less than several per sequence.
        rows: list[int] = []
        tokens: list[int] = []
        positions: list[int] = []
        sample_rows: list[int] = []
        sample_slots: list[int] = []
        for span in spans:
            count = len(span.tokens)
            rows += (span.slot, span.context_tokens, len(tokens), count)
            tokens += span.tokens
            if tokens[-1] < 0:
                tokens[-1] = -1 - span.slot
            positions += range(span.context_tokens, span.context_tokens + count)
            if span.sample:
                sample_rows.append(len(tokens) - 1)
                sample_slots.append(span.slot)

        meta = self._blank.copy()

        def put(name: str, values: Sequence[int]) -> None:
            begin = self._at[name].start
            meta[begin : begin + len(values)] = values

        put("spans", rows)
        put("tokens", tokens)
        put("positions", positions)
        put("sample_rows", sample_rows)
        put("sample_slots", sample_slots)
        if targets is not None:
            put("targets", targets)
        if sampling is not None:
            for name, array in sampling._asdict().items():
                meta[self._at[name]] = np.asarray(array).view(np.int32)
        spans_at = self._at["spans"].start
        decodes_only = int(self.shape.decodes_only)
        meta[:6] = (kv_id, len(spans), len(tokens), spans_at, len(sample_rows), decodes_only)
        return meta

    def unpack(self, meta: jax.Array) -> Unpacked:
        """The parts, inside a jitted step."""

        def part(name: str) -> jax.Array:
            at = self._at[name]
            words = lax.slice(meta, (at.start,), (at.stop,))
            dtype = _SAMPLING_DTYPES.get(name, np.dtype(np.int32))
            return words if dtype == np.int32 else lax.bitcast_convert_type(words, dtype)

        return Unpacked(
            num_rows=meta[2:3],
            num_samples=meta[4:5],
            tokens=part("tokens"),
            positions=part("positions"),
            targets=part("targets"),
            sample_rows=part("sample_rows"),
            sample_slots=part("sample_slots"),
            sampling=SamplingInputs(*(part(name) for name in _SAMPLING_DTYPES)),
        )


def check_decodes_only(meta: np.ndarray[tuple[int], np.dtype[np.int32]]) -> None:
    """Refuses a packed step whose shape is for decodes only (`StepShape.decodes_only`) and that
    has a sequence of several rows.

    Raises:
        ValueError: it is such a step.
    """
    rows, spans = int(meta[_NUM_ROWS]), int(meta[_NUM_SPANS])
    if meta[_DECODES_ONLY] and rows > spans:
        raise ValueError(
            f"a step of {rows} rows for {spans} sequences was packed for a shape that has no more "
            "rows than sequences, in which each has one row; take the shape from Buckets.fit"
        )


def sequences_of(words: int, rows: int) -> int:
    """S of the layout (`StepLayout`) that has so many words for T = `rows`."""
    per_row = 3  # token, position, target
    per_sequence = SPAN_WORDS + 2 + len(_SAMPLING_DTYPES)
    sequences, rest = divmod(words - HEADER_WORDS - per_row * rows, per_sequence)
    assert (rest, sequences > 0) == (0, True), f"no layout has {words} words for {rows} rows"
    return sequences


def resolve_tokens(tokens: jax.Array, last_tokens: jax.Array) -> jax.Array:
    """Token ids of a step: literal ones, and for -1 - slot what was last sampled there.

    Args:
        tokens: i32[T].
        last_tokens: i32[num_slots].
    """
    return jnp.where(tokens < 0, last_tokens[jnp.clip(-1 - tokens, 0)], tokens)
