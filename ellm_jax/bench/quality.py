"""What a cheaper way of computing costs in quality: two engines read the same text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ellm_jax.engine import Engine
from ellm_jax.outputs import TokenLogprobs
from ellm_jax.sampling import SamplingParams


@dataclass(frozen=True)
class Quality:
    """How two readings of a text differ.

    Attributes:
        tokens: that were predicted, each from those before it in its window.
        perplexity_before, perplexity_after: e to the mean of minus the log probability.
        mean_difference: of the tokens' log probabilities, without sign.
        largest_difference: of them.
        same_likeliest: share of tokens before which both held the same one for the likeliest.
    """

    tokens: int
    perplexity_before: float
    perplexity_after: float
    mean_difference: float
    largest_difference: float
    same_likeliest: float


def windows(token_ids: Sequence[int], length: int) -> list[list[int]]:
    """A text in pieces of `length` tokens, each read from nothing; what is left over at the end
    too, where it is two tokens or more."""
    pieces = [list(token_ids[at : at + length]) for at in range(0, len(token_ids), length)]
    return [piece for piece in pieces if len(piece) > 1]


def read(engine: Engine, pieces: Sequence[list[int]]) -> list[TokenLogprobs]:
    """What an engine thinks of every token but the first of each piece.

    Raises:
        RuntimeError: it could not read one.
    """
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    thoughts: list[TokenLogprobs] = []
    for output in engine.generate(pieces, params):
        if output.prompt_logprobs is None or output.outputs[0].error is not None:
            raise RuntimeError(f"a piece of the text could not be read: {output.outputs[0].error}")
        thoughts += [entry for entry in output.prompt_logprobs if entry is not None]
    return thoughts


def compare(before: Sequence[TokenLogprobs], after: Sequence[TokenLogprobs]) -> Quality:
    """Two readings of the same pieces, at least one token long."""
    pairs = list(zip(before, after, strict=True))
    differences = [abs(a.logprob - b.logprob) for a, b in pairs]
    return Quality(
        tokens=len(pairs),
        perplexity_before=_perplexity(before),
        perplexity_after=_perplexity(after),
        mean_difference=sum(differences) / len(pairs),
        largest_difference=max(differences),
        same_likeliest=sum(a.top[0][0] == b.top[0][0] for a, b in pairs) / len(pairs),
    )


def _perplexity(reading: Sequence[TokenLogprobs]) -> float:
    return math.exp(-sum(entry.logprob for entry in reading) / len(reading))


def quality_table(found: Quality, names: tuple[str, str]) -> str:
    """For people; `names` are of the two ways."""
    before, after = names
    rows = [
        ("tokens", f"{found.tokens}"),
        (f"perplexity, {before}", f"{found.perplexity_before:.4f}"),
        (f"perplexity, {after}", f"{found.perplexity_after:.4f}"),
        ("log probability, mean difference", f"{found.mean_difference:.4f}"),
        ("log probability, largest difference", f"{found.largest_difference:.4f}"),
        ("same likeliest token", f"{100 * found.same_likeliest:.2f} %"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value:>10}" for name, value in rows)
