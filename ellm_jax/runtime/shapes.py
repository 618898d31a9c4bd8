"""What steps are compiled for. Plain values, so that planning can speak of steps without JAX."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepShape:
    """A bucket: the padded shape of a step.

    Attributes:
        rows: T, token rows.
        seqs: S, sequences, and rows that can be sampled.
    """

    rows: int
    seqs: int

    @property
    def decodes_only(self) -> bool:
        """Whether there are no more rows than sequences. On a GPU such a step is launched without
        the kernels for prompts, and takes only sequences of one row each."""
        return self.rows <= self.seqs


@dataclass(frozen=True)
class StepMode:
    """What a step does besides the forward pass and sampling; each mode is compiled on its own.

    Attributes:
        logprobs: report log probabilities of the sampled rows.
        prompt_logprobs: report log probabilities of the prompt's tokens.
        masked: take a mask for each sampled row, of the tokens that it may sample.
    """

    logprobs: bool = False
    prompt_logprobs: bool = False
    masked: bool = False

    def __or__(self, other: StepMode) -> StepMode:
        """What a step does for two requests together."""
        return StepMode(
            self.logprobs or other.logprobs,
            self.prompt_logprobs or other.prompt_logprobs,
            self.masked or other.masked,
        )


@dataclass(frozen=True)
class StepKey:
    """What is compiled on its own: a bucket and a mode."""

    shape: StepShape
    mode: StepMode
