"""/v1/chat/completions: chats, answered whole or as a stream, with calls of tools."""

from __future__ import annotations

import time

import msgspec
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from ellm_jax.outputs import CompletionDelta, CompletionOutput, RequestUpdate
from ellm_jax.serving.call import Call
from ellm_jax.serving.http import replies
from ellm_jax.serving.http.body import read_json
from ellm_jax.serving.http.context import Caller, Context, Tally, caller_of, finish_reason, new_id
from ellm_jax.serving.http.disconnect import while_connected
from ellm_jax.serving.http.event_stream import EventStream, event, reply
from ellm_jax.serving.http.requests import ChatRequest
from ellm_jax.serving.http.sampling import chat_params
from ellm_jax.serving.http.streams import complete_all, events
from ellm_jax.serving.http.templates import prompt_ids
from ellm_jax.serving.http.tool_calls import Call as ToolCall
from ellm_jax.serving.http.tool_choice import ToolUse, tool_use

DECODER = msgspec.json.Decoder(ChatRequest)


class Chat:
    """The route, and the same for lines of batches."""

    def __init__(self, context: Context):
        self._context = context

    async def post(self, request: Request) -> Response:
        """Answers a request."""
        context, caller = self._context, caller_of(request)
        asked = await read_json(request, DECODER, context.config.max_body_bytes)
        if not asked.stream:
            return reply(await while_connected(request.receive, self.answer(asked, caller)))
        use = tool_use(asked, context.tool_format, context.config)
        call = await self._call(asked, use, caller)
        writer = _Writer(context, asked, use, call.params.n)
        return EventStream(events(context.service, [call], writer, writer.counts))

    async def answer(self, asked: ChatRequest, caller: Caller) -> replies.ChatCompletion:
        """The whole answer.

        Raises:
            HttpError, ServiceError: it was refused, or failed.
        """
        context = self._context
        use = tool_use(asked, context.tool_format, context.config)
        call = await self._call(asked, use, caller)
        (output,) = await complete_all(context.service, [call])
        tally = Tally()
        tally.add(output)
        ids = bool(asked.return_token_ids)
        return replies.ChatCompletion(
            new_id("chatcmpl"),
            int(time.time()),
            context.model,
            [self._choice(completion, use, ids) for completion in output.outputs],
            tally.usage,
            list(output.prompt_token_ids) if ids else UNSET,
        )

    async def _call(self, asked: ChatRequest, use: ToolUse, caller: Caller) -> Call:
        self._context.check_model(asked.model)
        params = chat_params(asked, use, self._context.config)
        # Before the template runs: a call that cannot be taken is not worth the work.
        self._context.service.check(caller.call((), params))
        ids = await prompt_ids(self._context.tokenizer, asked)
        return caller.call(ids, params)

    def _choice(self, completion: CompletionOutput, use: ToolUse, ids: bool) -> replies.ChatChoice:
        reason = finish_reason(completion.finish_reason, completion.error)
        message = replies.ChatMessage(completion.text)
        reader = use.reader()
        if reader is not None:
            parts = reader.feed(completion.text) + reader.finish()
            calls = [part for part in parts if isinstance(part, ToolCall)]
            message.content = "".join(part for part in parts if isinstance(part, str))
            if calls:
                message.content = message.content or None
                message.tool_calls = [_said(call) for call in calls]
                reason = "tool_calls" if reason == "stop" else reason
        entries = completion.logprobs
        return replies.ChatChoice(
            completion.index,
            message,
            None if entries is None else self._context.texts.chat(entries),
            reason,
            completion.stop_reason,
            list(completion.token_ids) if ids else UNSET,
        )


class _Writer:
    """Makes events of updates.

    Attributes:
        counts: whether the last event is to count tokens.
    """

    def __init__(self, context: Context, asked: ChatRequest, use: ToolUse, completions: int):
        self.counts = asked.stream_options is not None and asked.stream_options.include_usage
        self._texts = context.texts
        self._head = (new_id("chatcmpl"), int(time.time()), context.model)
        self._no_usage = None if self.counts else UNSET
        self._ids = bool(asked.return_token_ids)
        self._readers = [use.reader() for _ in range(completions)]
        self._begun = [False] * completions
        self._calls = [0] * completions

    def write(self, number: int, update: RequestUpdate) -> bytes:
        """The events for an update."""
        return b"".join([self._events(delta) for delta in update.deltas])

    def usage(self, usage: replies.Usage) -> bytes:
        """The event that counts tokens."""
        return event(replies.ChatChunk(*self._head, [], usage))

    def _events(self, delta: CompletionDelta) -> bytes:
        index = delta.index
        reason = finish_reason(delta.finish_reason, delta.error)
        said = self._deltas(index, delta.text, reason is not None)
        if self._calls[index] and reason == "stop":
            reason = "tool_calls"
        if not said and (reason or delta.logprobs or self._ids):
            said = [replies.Delta()]
        if said and not self._begun[index]:
            self._begun[index] = True
            said[0].role = "assistant"
            if said[0].tool_calls is UNSET and said[0].content is UNSET:
                said[0].content = ""
        choices = [replies.ChunkChoice(index, each) for each in said]
        if choices:
            last = choices[-1]
            last.finish_reason = reason
            if reason:
                last.stop_reason = delta.stop_reason
            if delta.logprobs:
                last.logprobs = self._texts.chat(delta.logprobs)
            if self._ids:
                last.token_ids = list(delta.token_ids)
        return b"".join(
            [event(replies.ChatChunk(*self._head, [each], self._no_usage)) for each in choices]
        )

    def _deltas(self, index: int, text: str, over: bool) -> list[replies.Delta]:
        reader = self._readers[index]
        if reader is None:
            return [replies.Delta(content=text)] if text else []
        parts = reader.feed(text)
        if over:
            parts += reader.finish()
        deltas = []
        for part in parts:
            if isinstance(part, str):
                deltas.append(replies.Delta(content=part))
                continue
            function = replies.FunctionCall(part.name, part.arguments)
            call = replies.ToolCallDelta(self._calls[index], part.id, function)
            deltas.append(replies.Delta(tool_calls=[call]))
            self._calls[index] += 1
        return deltas


def _said(call: ToolCall) -> replies.ToolCall:
    return replies.ToolCall(call.id, replies.FunctionCall(call.name, call.arguments))
