"""One request of a workload or a trace, and the prompt that stands for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

BLOCK_TOKENS = 512
"""Tokens that one id of `TraceRequest.prefix` stands for."""

_BLOCK_STREAM = 1


class WorkloadError(ValueError):
    """A workload or trace that makes no sense; says where and why."""


@dataclass(frozen=True)
class TraceRequest:
    """One request of a workload.

    Attributes:
        arrival_s: seconds after the start.
        prompt_tokens: tokens of the prompt.
        output_tokens: tokens to generate, exactly.
        prefix: ids of the prompt's blocks of `BLOCK_TOKENS` tokens, from the first on: requests
            with equal leading ids have equal leading blocks. None: nothing is shared.
        prompt: its text; None where only lengths are known.
        id: what the file calls it, else its number there.
        token_ids: the prompt's tokens; None where they are not given.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    prefix: tuple[int, ...] | None = None
    prompt: str | None = None
    id: str = ""
    token_ids: tuple[int, ...] | None = None

    def prompt_ids(
        self,
        vocab_size: int,
        seed: int,
        index: int,
        encode: Callable[[str], Sequence[int]] | None = None,
    ) -> list[int]:
        """The `prompt_tokens` tokens of the prompt.

        Those that are given; else the text's, where there is a tokenizer; else random ones. A
        block of `prefix` has tokens that depend on the seed and its id alone, so that shared
        blocks are equal token for token; all others depend on the seed and the index.

        Args:
            vocab_size: ids are below it.
            seed: of the random tokens.
            index: the request's place in the workload.
            encode: the model's tokenizer; without one, text counts by its length only.
        """
        known: list[int] = []
        if self.token_ids is not None:
            known = list(self.token_ids)
        elif self.prompt is not None and encode is not None:
            known = list(encode(self.prompt))
        elif self.prefix is not None:
            for block in self.prefix[: -(-self.prompt_tokens // BLOCK_TOKENS)]:
                rng = np.random.default_rng([seed, block, _BLOCK_STREAM])
                known += rng.integers(0, vocab_size, BLOCK_TOKENS).tolist()
        missing = self.prompt_tokens - len(known)
        if missing > 0:
            rng = np.random.default_rng([seed, index])
            known += rng.integers(0, vocab_size, missing).tolist()
        return known[: self.prompt_tokens]

    def clamped(
        self, max_prompt_tokens: int | None = None, max_output_tokens: int | None = None
    ) -> TraceRequest:
        """The request with its prompt cut at its end and its answer shortened to these lengths."""
        prompt = min(self.prompt_tokens, max_prompt_tokens or self.prompt_tokens)
        output = min(self.output_tokens, max_output_tokens or self.output_tokens)
        return dataclasses.replace(
            self,
            prompt_tokens=prompt,
            output_tokens=output,
            prefix=None if self.prefix is None else self.prefix[: -(-prompt // BLOCK_TOKENS)],
            token_ids=None if self.token_ids is None else self.token_ids[:prompt],
        )
