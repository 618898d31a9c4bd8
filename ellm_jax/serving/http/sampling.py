"""From a request's fields to `SamplingParams`."""

from __future__ import annotations

from typing import Any

from ellm_jax.sampling import SamplingParams
from ellm_jax.serving.errors import refused
from ellm_jax.serving.http.errors import HttpError
from ellm_jax.serving.http.forms import form_of
from ellm_jax.serving.http.requests import ChatRequest, Common, CompletionRequest
from ellm_jax.serving.http.tool_choice import ToolUse
from ellm_jax.serving.settings import ServeConfig
from ellm_jax.structured.output import StructuredOutput

_SAME_NAMES = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "max_tokens",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "seed",
    "skip_special_tokens",
    "include_stop_str_in_output",
)
_UNSUPPORTED = {
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "moderation": (),
    "prompt_cache_options": (),
    "modalities": (["text"],),
}
"""Fields of chats that are known and not supported, and the values that ask for nothing."""


def text_params(request: CompletionRequest, config: ServeConfig) -> SamplingParams:
    """How to sample a completion.

    Raises:
        HttpError, ServiceError: a field that is not supported, or has a value that is not.
    """
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise _unsupported("best_of", "ask for n completions and choose among them")
    if request.suffix:
        raise _unsupported("suffix", "leave it out")
    if request.echo:
        raise _unsupported("echo", "put the prompt before the text yourself")
    return _params(request, {"logprobs": request.logprobs}, form_of(request, None, config))


def chat_params(request: ChatRequest, use: ToolUse, config: ServeConfig) -> SamplingParams:
    """How to sample the answer of a chat; without a limit, up to the model's.

    Raises:
        HttpError, ServiceError: a field that is not supported, or has a value that is not.
    """
    for name, harmless in _UNSUPPORTED.items():
        value = getattr(request, name)
        if value is not None and value not in harmless:
            raise _unsupported(name, "leave it out")
    limit = request.max_completion_tokens
    if limit is not None and request.max_tokens not in (None, limit):
        raise HttpError(
            400,
            "max_tokens and max_completion_tokens differ; give one of them",
            param="max_completion_tokens",
        )
    if request.top_logprobs is not None and not request.logprobs:
        raise HttpError(400, "top_logprobs needs logprobs: true; add it", param="top_logprobs")
    more: dict[str, Any] = {"max_tokens": limit or request.max_tokens}
    if request.logprobs:
        more["logprobs"] = request.top_logprobs or 0
    return _params(request, more, form_of(request, use.schema, config))


def _params(request: Common, more: dict[str, Any], form: StructuredOutput | None) -> SamplingParams:
    values = {name: value for name in _SAME_NAMES if (value := getattr(request, name)) is not None}
    if request.stream_options is not None and not request.stream:
        raise HttpError(400, "stream_options needs stream: true; add it", param="stream_options")
    try:
        return SamplingParams(**values | more, structured=form)
    except (ValueError, TypeError) as error:
        raise refused(error) from error


def _unsupported(name: str, remedy: str) -> HttpError:
    return HttpError(400, f"{name} is not supported; {remedy}", param=name)
