"""Turns what a user hands over into requests, or says what is wrong with it."""

from __future__ import annotations

import dataclasses
import numbers
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ellm_jax.config import check_target, format_bytes
from ellm_jax.models.config import ModelConfig
from ellm_jax.outputs import CompletionOutput, RequestMetrics, RequestOutput
from ellm_jax.request import Request, Status
from ellm_jax.sampling import SamplingParams
from ellm_jax.structured.grammars import Grammar, Grammars
from ellm_jax.structured.output import StructuredOutput
from ellm_jax.text import CompletionText
from ellm_jax.tokenizer import Tokenizer

Message: TypeAlias = Mapping[str, Any]
Prompt: TypeAlias = str | Sequence[int] | NDArray[np.integer[Any]] | Sequence[Message]
"""A text, token ids, or the messages of a chat."""

_MAX_PRIORITY = 1000


def is_single(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Whether this is one prompt rather than a list of them."""
    if isinstance(prompts, np.ndarray):
        return prompts.ndim < 2
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence):
        # Odd ones too: as a prompt they are refused with a message that names their type.
        return True
    first = prompts[0] if len(prompts) else None
    return isinstance(first, numbers.Number | Mapping)


def params_per_prompt(params: object, count: int) -> list[SamplingParams]:
    """One for each of `count` prompts, from None, one for all, or a sequence.

    Raises:
        ValueError: their number differs.
        TypeError: they are something else.
    """
    if params is None:
        return [SamplingParams()] * count
    if isinstance(params, Sequence) and not isinstance(params, str | bytes):
        if len(params) != count:
            raise ValueError(
                f"{len(params)} sampling parameters for {count} prompts; give one for all, or one "
                "each"
            )
        return [_checked_params(each) for each in params]
    return [_checked_params(params)] * count


def _checked_params(params: object) -> SamplingParams:
    if not isinstance(params, SamplingParams):
        remedy = (
            "write SamplingParams.from_dict(...) around it"
            if isinstance(params, Mapping)
            else "give SamplingParams(...)"
        )
        raise TypeError(f"sampling parameters of type {type(params).__name__}; {remedy}")
    return params


@dataclass(frozen=True)
class RequestOptions:
    """What a request may bring beside its sampling parameters; checked when made.

    Attributes:
        priority: lower is sooner; a level counts as ten seconds of waiting. From -1000 to 1000.
        ttft_ms, tpot_ms: latency targets in milliseconds; None: the engine's.
        cache_salt: requests with different salts share no cached prefixes.
    """

    priority: int = 0
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    cache_salt: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.priority, int) or isinstance(self.priority, bool):
            raise TypeError(f"priority={self.priority!r}: must be a whole number")
        if not -_MAX_PRIORITY <= self.priority <= _MAX_PRIORITY:
            raise ValueError(
                f"priority={self.priority}: must be from {-_MAX_PRIORITY} to {_MAX_PRIORITY}"
            )
        for name in ("ttft_ms", "tpot_ms"):
            check_target(name, getattr(self, name))
        if not isinstance(self.cache_salt, str):
            raise TypeError(f"cache_salt={self.cache_salt!r}: must be text")


@dataclass(eq=False)
class Group:
    """A user's request: the completions of one prompt.

    Attributes:
        id: the user's or the engine's name for it.
        prompt: its text; None where token ids were given.
        requests: one per completion.
        texts: their texts; None without a tokenizer.
        grammar: what their output has to be, compiled or being compiled; None: anything.
    """

    id: str
    prompt: str | None
    requests: list[Request]
    texts: dict[Request, CompletionText | None] = field(default_factory=dict)
    grammar: Future[Grammar] | None = None

    @property
    def finished(self) -> bool:
        """Whether every completion is over."""
        return all(request.status is Status.FINISHED for request in self.requests)

    def output(self) -> RequestOutput:
        """Everything so far."""
        # First: the engine's thread may end it meanwhile, and what says that it is over must have
        # everything.
        finished = self.finished
        first = self.requests[0]
        prompt_logprobs = None
        if first.params.prompt_logprobs is not None:
            prompt_logprobs = tuple(first.prompt_logprobs)
        return RequestOutput(
            request_id=self.id,
            prompt=self.prompt,
            prompt_token_ids=first.prompt_ids,
            outputs=tuple(self._completion(i) for i in range(len(self.requests))),
            finished=finished,
            metrics=self.metrics(),
            prompt_logprobs=prompt_logprobs,
        )

    def _completion(self, index: int) -> CompletionOutput:
        request = self.requests[index]
        text = self.texts[request]
        wants = request.params.logprobs is not None
        return CompletionOutput(
            index=index,
            text="" if text is None else text.text,
            token_ids=tuple(request.output_ids),
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            cumulative_logprob=sum(e.logprob for e in request.logprobs) if wants else None,
            logprobs=tuple(request.logprobs) if wants else None,
            error=request.error,
        )

    def metrics(self) -> RequestMetrics:
        """Times and counts so far."""

        def earliest(name: str) -> float | None:
            values = [getattr(request, name) for request in self.requests]
            return min((v for v in values if v is not None), default=None)

        ends = [request.finished_s for request in self.requests]
        first = self.requests[0]
        return RequestMetrics(
            arrival_s=first.arrival_s,
            first_scheduled_s=earliest("first_scheduled_s"),
            first_token_s=earliest("first_token_s"),
            finished_s=None if None in ends else max(e for e in ends if e is not None),
            num_preemptions=sum(request.num_preemptions for request in self.requests),
            num_offloads=sum(request.num_offloads for request in self.requests),
            cached_tokens=first.cached_tokens,
            output_tokens=max(len(request.output_ids) for request in self.requests),
        )


@dataclass(frozen=True)
class Intake:
    """Checks prompts against the model and its limits, and makes requests of them.

    Attributes:
        model_config: of the model.
        tokenizer: None where the checkpoint has none: token ids only.
        max_model_len: most tokens of prompt and output together.
        room_bytes: what one request alone could take of the KV cache.
        tile_tokens, chunk_bytes: how tokens become bytes of KV.
        defaults: targets of requests that bring none.
        grammars: compiles what outputs have to be; None without a tokenizer.
    """

    model_config: ModelConfig
    tokenizer: Tokenizer | None
    max_model_len: int
    room_bytes: int
    tile_tokens: int
    chunk_bytes: int
    defaults: RequestOptions = field(default_factory=lambda: RequestOptions())
    grammars: Grammars | None = None

    def group(
        self,
        prompt: Prompt,
        params: SamplingParams,
        group_id: str,
        arrival_s: float,
        options: RequestOptions | None = None,
    ) -> Group:
        """Makes the requests of one prompt.

        Raises:
            ValueError, TypeError: the prompt or the parameters do not suit the model; says why.
        """
        params = _checked_params(params)
        options = options or RequestOptions()
        text, ids = self._tokenize(prompt)
        self._check_ids(ids)
        params = self._fit(params, len(ids))
        seed = params.seed if params.seed is not None else random.getrandbits(63)
        seeded = dataclasses.replace(params, seed=seed)
        stop_ids = frozenset(params.stop_token_ids or ())
        if not params.ignore_eos:
            stop_ids |= frozenset(self.model_config.eos_token_ids)
        group = Group(group_id, text, [])
        if params.structured is not None:
            group.grammar = self.compile(params.structured)
        for index in range(params.n):
            request = Request(
                id=group_id if params.n == 1 else f"{group_id}/{index}",
                prompt_ids=ids,
                params=params,
                seed=seeded.noise_seed(index),
                stop_ids=stop_ids,
                arrival_s=arrival_s,
                priority=options.priority,
                ttft_ms=options.ttft_ms or self.defaults.ttft_ms,
                tpot_ms=options.tpot_ms or self.defaults.tpot_ms,
                salt=options.cache_salt.encode(),
            )
            group.requests.append(request)
            group.texts[request] = (
                None if self.tokenizer is None else CompletionText(self.tokenizer, ids, params)
            )
        return group

    def compile(self, structured: StructuredOutput) -> Future[Grammar]:
        """What an output has to be, compiled now or soon; see `Grammars.get`.

        Raises:
            ValueError: there is no tokenizer, or it cannot be compiled now.
        """
        self._need_tokenizer("structured output")
        assert self.grammars is not None
        return self.grammars.get(structured)

    def _tokenize(self, prompt: Prompt) -> tuple[str | None, tuple[int, ...]]:
        if isinstance(prompt, str):
            if not prompt:
                raise ValueError("the prompt is empty; give at least one character or token")
            return prompt, tuple(self._need_tokenizer("a text").encode(_checked_text(prompt)))
        if isinstance(prompt, np.ndarray):
            prompt = prompt.tolist()
        if isinstance(prompt, Mapping) and "role" in prompt:
            raise TypeError(
                f"one chat message (a {type(prompt).__name__}) where a prompt should be; "
                "put it into a list: [message]"
            )
        if isinstance(prompt, bytes) or not isinstance(prompt, Sequence):
            raise TypeError(
                f"a prompt of type {type(prompt).__name__}; give a text, a list of token ids, or "
                "a list of chat messages"
            )
        if not prompt:
            raise ValueError("the prompt is empty; give at least one character or token")
        if all(isinstance(part, Mapping) for part in prompt):
            tokenizer = self._need_tokenizer("a chat")
            text = _checked_text(tokenizer.apply_chat_template(prompt))  # type: ignore[arg-type]
            return text, tuple(tokenizer.encode(text, add_special_tokens=False))
        ids = []
        for part in prompt:
            if not isinstance(part, numbers.Integral) or isinstance(part, bool):
                raise TypeError(
                    f"the prompt has {part!r} among its token ids; give whole numbers only"
                )
            ids.append(int(part))
        return None, tuple(ids)

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                f"{what} was given, but the checkpoint has no tokenizer.json; give token ids, or "
                "put the tokenizer beside the weights"
            )
        return self.tokenizer

    def _check_ids(self, ids: Sequence[int]) -> None:
        vocab = self.model_config.vocab_size
        if not ids:
            raise ValueError("the prompt has no tokens; give at least one")
        bad = next((token for token in ids if not 0 <= token < vocab), None)
        if bad is not None:
            raise ValueError(
                f"token id {bad} is outside the vocabulary of {vocab} tokens; "
                f"use ids from 0 to {vocab - 1}"
            )
        if len(ids) >= self.max_model_len:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, and with room for one more the limit is "
                f"max_model_len={self.max_model_len} (the model's context is "
                f"{self.model_config.max_context}); shorten the prompt"
            )

    def _fit(self, params: SamplingParams, prompt_tokens: int) -> SamplingParams:
        vocab = self.model_config.vocab_size
        for token in params.logit_bias or ():
            if token >= vocab:
                raise ValueError(
                    f"logit_bias names token {token}, outside the vocabulary of {vocab} tokens; "
                    f"use ids from 0 to {vocab - 1}"
                )
        if params.stop_strings:
            self._need_tokenizer("a stop string")
        room = self.max_model_len - prompt_tokens
        # The last token is never written to the KV cache.
        memory_room = self.room_bytes // self.chunk_bytes * self.tile_tokens - prompt_tokens + 1
        wanted = max(1, memory_room) if params.max_tokens is None else params.max_tokens
        max_tokens = min(wanted, room)
        if max_tokens > memory_room:
            total = prompt_tokens + max_tokens - 1
            bytes_needed = -(-total // self.tile_tokens) * self.chunk_bytes
            remedy = "lower max_tokens" if memory_room > 0 else "shorten the prompt"
            raise ValueError(
                f"a prompt of {prompt_tokens} tokens with up to {max_tokens} new ones takes "
                f"{format_bytes(bytes_needed)} of KV cache, and device_memory leaves "
                f"{format_bytes(self.room_bytes)} beside weights and activations: it can never "
                f"run; raise device_memory, or {remedy}"
            )
        min_tokens = min(params.min_tokens, max_tokens)
        return dataclasses.replace(params, max_tokens=max_tokens, min_tokens=min_tokens)


def _checked_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the prompt has U+{ord(text[error.start]):04X} at character {error.start}, which is "
            "half of a surrogate pair and no character; take it out, or decode the text's bytes "
            "anew"
        ) from error
    return text
