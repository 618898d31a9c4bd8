"""Chats as prompts: the checkpoint's template, in its sandbox, within a limit of time.

A client chooses what a template loops over, and a template may loop within loops; so it runs on a
thread of its own under a tracer that ends it, wherever it is, once its time is over.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

from ellm_jax.serving.http.errors import HttpError
from ellm_jax.serving.http.requests import ChatRequest, Message, Tool
from ellm_jax.tokenizer import ChatTemplateError, Tokenizer

TEMPLATE_TIMEOUT_S = 2.0
"""Longest time that a chat template may take."""


class _TimeOver(BaseException):
    """Not an `Exception`: neither a template nor what calls it may swallow it."""


async def prompt_ids(tokenizer: Tokenizer | None, request: ChatRequest) -> list[int]:
    """The prompt of a chat, as token ids.

    Raises:
        HttpError: there is no tokenizer or no template, or it refuses the chat or takes too long.
    """
    if tokenizer is None:
        raise HttpError(
            400,
            "the model has no tokenizer; send token ids to /v1/completions",
            param="messages",
        )
    messages = [_message(i, message) for i, message in enumerate(request.messages)]
    tools = None if request.tool_choice == "none" else _tools(request.tools)
    variables: dict[str, Any] = dict(request.chat_template_kwargs or {})
    for name in ("messages", "tools", "add_generation_prompt", "template_name"):
        if name in variables:
            raise HttpError(
                400,
                f"{name} is no variable of your own; leave it out",
                param="chat_template_kwargs",
            )

    def render() -> list[int]:
        text = within(
            TEMPLATE_TIMEOUT_S,
            lambda: tokenizer.apply_chat_template(messages, tools, **variables),
        )
        # A template writes the special tokens itself.
        return tokenizer.encode(text, add_special_tokens=False)

    try:
        ids = await asyncio.to_thread(render)
    except ChatTemplateError as error:
        raise HttpError(400, str(error), param="messages") from error
    except _TimeOver as error:
        raise HttpError(
            400,
            f"the chat template takes longer than {TEMPLATE_TIMEOUT_S:g} s for this chat; send "
            "fewer messages or tools",
            param="messages",
        ) from error
    if not ids:
        raise HttpError(400, "the chat template writes nothing for this chat", param="messages")
    return ids


def within(seconds: float, function: Callable[[], str]) -> str:
    """Calls a function of Python code, and ends it once its time is over.

    Raises:
        _TimeOver: it was.
    """
    end = time.monotonic() + seconds

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > end:
            raise _TimeOver
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return function()
    finally:
        sys.settrace(before)


def _message(index: int, message: Message) -> dict[str, Any]:
    """A message as templates expect it: the content as one text, arguments as objects."""
    where = f"messages[{index}]"
    if message.audio is not None or message.function_call is not None:
        raise HttpError(400, f"{where}: audio and function_call are not supported", param=where)
    content = message.content
    if isinstance(content, list):
        other = next((part.type for part in content if part.type not in ("text", "refusal")), None)
        if other is not None:
            raise HttpError(
                400, f"{where} has a part of type {other!r}; only text is read", param=where
            )
        content = "".join(part.text or part.refusal or "" for part in content)
    if content is None:
        if message.role != "assistant":
            raise HttpError(400, f"{where} has no content; give a text", param=where)
        content = ""
    # What OpenAI calls a developer's message, templates call the system's.
    role = "system" if message.role == "developer" else message.role
    said: dict[str, Any] = {"role": role, "content": content}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            said[name] = value
    if message.tool_calls:
        said["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(call.function.arguments, where),
                },
            }
            for call in message.tool_calls
        ]
    return said


def _arguments(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise HttpError(
            400,
            f"{where}.tool_calls: the arguments have half a surrogate pair, which is no text; "
            "leave it out",
            param=where,
        ) from error
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise HttpError(
            400,
            f"{where}.tool_calls: the arguments are no JSON object; send them as received",
            param=where,
        )
    return value


def _tools(tools: Sequence[Tool] | None) -> list[Mapping[str, Any]] | None:
    if not tools:
        return None
    return [
        {
            "type": "function",
            "function": {
                "name": tool.function.name,
                "description": tool.function.description or "",
                "parameters": tool.function.parameters or {"type": "object", "properties": {}},
            },
        }
        for tool in tools
    ]
