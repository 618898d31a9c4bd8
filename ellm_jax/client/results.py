"""What a client gives back."""

from __future__ import annotations

from dataclasses import dataclass

from ellm_jax.outputs import CompletionDelta, CompletionOutput, TokenLogprobs


@dataclass(frozen=True)
class Usage:
    """What a call took. Times are milliseconds on the server's clock; None where there is none.

    Attributes:
        prompt_tokens, completion_tokens: how many.
        cached_tokens: of the prompt, found instead of computed.
        queue_ms: until a step first took some of it.
        ttft_ms: until the first token.
        tpot_ms: mean per token after that.
        e2e_ms: until the end.
        preemptions, offloads: how often it lost its memory, and went to host memory.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    queue_ms: float | None
    ttft_ms: float | None
    tpot_ms: float | None
    e2e_ms: float | None
    preemptions: int
    offloads: int


@dataclass(frozen=True)
class Generation:
    """A call that is over.

    Attributes:
        request_id: the server's name for it.
        completions: one per completion, by index.
        usage: what it took.
        prompt_token_ids: the tokens that the model was given.
        prompt_logprobs: one per token of the prompt, if asked for; the first is None.
    """

    request_id: str
    completions: tuple[CompletionOutput, ...]
    usage: Usage
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None

    @property
    def text(self) -> str:
        """The text of the first completion."""
        return self.completions[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens of the first completion."""
        return self.completions[0].token_ids


@dataclass(frozen=True)
class GenerationDelta:
    """What is new of a stream.

    Attributes:
        request_id: the server's name for the call.
        deltas: the completions that moved, by index.
        usage: what the call took, with the last delta.
        prompt_logprobs: with the first delta, if asked for.
    """

    request_id: str
    deltas: tuple[CompletionDelta, ...]
    usage: Usage | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None

    @property
    def text(self) -> str:
        """What is new of the first completion's text."""
        return "".join(delta.text for delta in self.deltas if delta.index == 0)


@dataclass(frozen=True)
class Model:
    """The model that is served; see `ellm_jax.serving.info.ModelInfo`."""

    name: str
    family: str
    dtype: str
    quantization: str
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    has_tokenizer: bool


@dataclass(frozen=True)
class Memory:
    """Bytes by owner; `free + kv + cache + activation + weights + workspace == limit`. See
    `ellm_jax.memory.report.MemoryReport`."""

    limit_bytes: int
    free_bytes: int
    kv_bytes: int
    cache_bytes: int
    activation_bytes: int
    weights_bytes: int
    workspace_bytes: int
    available_bytes: int
    backed_bytes: int
    physical_bytes: int
    host_limit_bytes: int
    host_used_bytes: int
