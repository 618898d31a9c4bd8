"""What a request gives back: texts, tokens, log probabilities and times."""

import dataclasses
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclasses.dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The log probability of one token, from the model's logits before any sampling filter.

    Attributes:
        token_id: The token that was chosen (or, for a prompt, that stands there).
        logprob: Its natural log probability.
        rank: 1 for the likeliest token of the vocabulary; tokens of equal probability share
            the better rank.
        top: The likeliest tokens as (id, log probability), likeliest first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class RequestMetrics:
    """When what happened to a request. Times are seconds on one monotonic clock.

    Attributes:
        arrival_s: When the engine was given the request.
        first_scheduled_s: When a step first took some of its tokens.
        first_token_s: When its first generated token reached the host.
        finished_s: When its last token reached the host.
        num_preemptions: How often it lost its memory and was computed again.
        num_offloads: How often it went to host memory and came back.
        cached_tokens: Prompt tokens whose K and V were found instead of computed.
        output_tokens: Tokens of the longest completion so far; what ``tpot_ms`` divides by.
    """

    arrival_s: float
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    num_preemptions: int = 0
    num_offloads: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0

    @property
    def ttft_ms(self) -> float | None:
        """Milliseconds from arrival to the first token; None before it."""
        return _milliseconds(self.arrival_s, self.first_token_s)

    @property
    def tpot_ms(self) -> float | None:
        """Mean milliseconds per token after the first; None before the end or with one token."""
        total = _milliseconds(self.first_token_s, self.finished_s)
        if total is None or self.output_tokens < 2:
            return None
        return total / (self.output_tokens - 1)

    @property
    def e2e_ms(self) -> float | None:
        """Milliseconds from arrival to the end; None before it."""
        return _milliseconds(self.arrival_s, self.finished_s)


@dataclasses.dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One continuation of a prompt, so far.

    Attributes:
        index: Which of the request's ``n`` completions.
        text: The text; what could still become a stop string is held back.
        token_ids: Generated tokens, with the stop token if one ended it.
        finish_reason: None while it runs.
        stop_reason: The stop string or stop token id that ended it; None if the model's
            end-of-text token did, or nothing did.
        cumulative_logprob: Sum of the tokens' log probabilities, where they were asked for.
        logprobs: One entry per token, where they were asked for.
        error: What went wrong, when ``finish_reason`` is "error".
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    cumulative_logprob: float | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    error: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class RequestOutput:
    """A request and its completions, so far.

    Attributes:
        request_id: The id given to, or made by, the engine.
        prompt: The prompt's text; None when token ids were given.
        prompt_token_ids: The tokens the model was given.
        outputs: One entry per completion, by index.
        finished: Whether every completion has ended.
        metrics: When what happened.
        prompt_logprobs: One entry per prompt token, where they were asked for. The first is
            None: nothing precedes it.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None

    @property
    def text(self) -> str:
        """The text of the first completion."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The generated tokens of the first completion."""
        return self.outputs[0].token_ids


@dataclasses.dataclass(slots=True)
class CompletionDelta:
    """What is new of one continuation. Not frozen: that would double the cost of making one, and
    one is made for every token of a stream.

    Attributes:
        index: Which of the request's ``n`` completions.
        text: What comes behind the text so far; may be empty.
        token_ids: The tokens that came, in order.
        finish_reason, stop_reason, error: As in ``CompletionOutput``, once, when it has ended.
        logprobs: One entry per new token, where they were asked for.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None


class RequestUpdate(NamedTuple):
    """What is new of a request. Its texts and tokens, put behind each other, are the output.

    Attributes:
        deltas: The completions that moved, by index.
        finished: Whether every completion has ended; nothing comes after that.
    """

    deltas: tuple[CompletionDelta, ...]
    finished: bool


def _milliseconds(start_s: float | None, end_s: float | None) -> float | None:
    return None if start_s is None or end_s is None else (end_s - start_s) * 1000.0
