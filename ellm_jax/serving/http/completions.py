"""/v1/completions: prompts as texts or token ids, answered whole or as a stream."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence

import msgspec
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from ellm_jax.outputs import CompletionDelta, CompletionOutput, RequestUpdate
from ellm_jax.serving.call import Call
from ellm_jax.serving.errors import ErrorKind, ServiceError
from ellm_jax.serving.http import replies
from ellm_jax.serving.http.body import read_json
from ellm_jax.serving.http.context import Caller, Context, Tally, caller_of, finish_reason, new_id
from ellm_jax.serving.http.disconnect import while_connected
from ellm_jax.serving.http.event_stream import EventStream, event, reply
from ellm_jax.serving.http.requests import CompletionRequest
from ellm_jax.serving.http.sampling import text_params
from ellm_jax.serving.http.streams import complete_all, events

DECODER = msgspec.json.Decoder(CompletionRequest)


class Completions:
    """The route, and the same for lines of batches."""

    def __init__(self, context: Context):
        self._context = context

    async def post(self, request: Request) -> Response:
        """Answers a request."""
        context, caller = self._context, caller_of(request)
        asked = await read_json(request, DECODER, context.config.max_body_bytes)
        if not asked.stream:
            return reply(await while_connected(request.receive, self.answer(asked, caller)))
        calls = self._calls(asked, caller)
        writer = _Writer(context, asked, calls[0].params.n)
        return EventStream(events(context.service, calls, writer, writer.counts))

    async def answer(self, asked: CompletionRequest, caller: Caller) -> replies.Completion:
        """The whole answer.

        Raises:
            HttpError, ServiceError: it was refused, or failed.
        """
        calls = self._calls(asked, caller)
        tally = Tally()
        choices: list[replies.TextChoice] = []
        for output in await complete_all(self._context.service, calls):
            tally.add(output)
            prompt_ids = output.prompt_token_ids if asked.return_token_ids else None
            for completion in output.outputs:
                choices.append(self._choice(len(choices), completion, prompt_ids))
        return replies.Completion(
            new_id("cmpl"), int(time.time()), self._context.model, choices, tally.usage
        )

    def _calls(self, asked: CompletionRequest, caller: Caller) -> list[Call]:
        self._context.check_model(asked.model)
        prompts = _prompts(asked.prompt)
        most = self._context.config.max_prompts
        if len(prompts) > most:
            raise ServiceError(
                ErrorKind.TOO_LARGE,
                f"prompt has {len(prompts)} prompts, and this server takes {most}; send fewer",
                param="prompt",
            )
        params = text_params(asked, self._context.config)
        if len(prompts) == 1:
            return [caller.call(prompts[0], params)]
        return [caller.call(prompt, params, i) for i, prompt in enumerate(prompts)]

    def _choice(
        self, index: int, completion: CompletionOutput, prompt_ids: Sequence[int] | None
    ) -> replies.TextChoice:
        entries = completion.logprobs
        return replies.TextChoice(
            index,
            completion.text,
            None if entries is None else self._context.texts.completion(entries, 0),
            finish_reason(completion.finish_reason, completion.error),
            completion.stop_reason,
            UNSET if prompt_ids is None else list(completion.token_ids),
            UNSET if prompt_ids is None else list(prompt_ids),
        )


class _Writer:
    """Makes events of updates.

    Attributes:
        counts: whether the last event is to count tokens.
    """

    def __init__(self, context: Context, asked: CompletionRequest, per_prompt: int):
        self.counts = asked.stream_options is not None and asked.stream_options.include_usage
        self._texts = context.texts
        self._head = (new_id("cmpl"), int(time.time()), context.model)
        self._no_usage = None if self.counts else UNSET
        self._per_prompt = per_prompt
        self._ids = bool(asked.return_token_ids)
        # Without a tokenizer there is no text to wait for.
        self._every_token = self._ids or context.tokenizer is None
        self._chars: dict[int, int] = defaultdict(int)

    def write(self, number: int, update: RequestUpdate) -> bytes:
        """The events for an update of a prompt's completions."""
        first = number * self._per_prompt
        return b"".join([self._event(first + delta.index, delta) for delta in update.deltas])

    def usage(self, usage: replies.Usage) -> bytes:
        """The event that counts tokens."""
        return event(replies.Completion(*self._head, [], usage))

    def _event(self, index: int, delta: CompletionDelta) -> bytes:
        reason = finish_reason(delta.finish_reason, delta.error)
        if not (delta.text or delta.logprobs or reason or self._every_token):
            return b""
        logprobs = None
        if delta.logprobs:
            offset = self._chars[index]
            logprobs = self._texts.completion(delta.logprobs, offset)
            self._chars[index] += sum(map(len, logprobs.tokens))
        choice = replies.TextChoice(index, delta.text, logprobs, reason, delta.stop_reason)
        if self._ids:
            choice.token_ids = list(delta.token_ids)
        return event(replies.Completion(*self._head, [choice], self._no_usage))


def _prompts(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """The prompts that a field stands for: a text, token ids, or a list of either.

    Raises:
        ServiceError: it mixes them.
    """
    if isinstance(prompt, str):
        return [prompt]
    if all(isinstance(part, int) for part in prompt):
        return [prompt]  # type: ignore[list-item]
    if any(isinstance(part, int) for part in prompt):
        raise ServiceError(
            ErrorKind.INVALID,
            "prompt mixes token ids with prompts; put the ids of a prompt into a list of their own",
            param="prompt",
        )
    return prompt  # type: ignore[return-value]
