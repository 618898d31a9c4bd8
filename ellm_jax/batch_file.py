"""OpenAI's batch files: what a line of the input asks for, and how a line of the output says it.

Knows nothing of engines and files: text in, values out.

The body's fields mean what they mean in OpenAI's API, with the sampling fields of vLLM beside them
(top_k, min_p, repetition_penalty, min_tokens, stop_token_ids, ignore_eos, skip_special_tokens).
Fields that only bookkeeping reads are ignored; any other unknown field is refused, since ignoring
it would change the answer without a word.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ellm_jax.outputs import CompletionOutput, RequestOutput, TokenLogprobs
from ellm_jax.sampling import SamplingParams

CHAT_URL = "/v1/chat/completions"
COMPLETIONS_URL = "/v1/completions"

_SAMPLING_FIELDS = frozenset(
    {
        "n",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "seed",
        "max_tokens",
        "min_tokens",
        "stop",
        "stop_token_ids",
        "ignore_eos",
        "skip_special_tokens",
        "include_stop_str_in_output",
    }
)
_IGNORED_FIELDS = frozenset({"model", "user", "metadata", "store", "service_tier"})
_ONLY_VALUES: Mapping[str, tuple[Any, ...]] = {
    "stream": (False,),
    "stream_options": (),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "modalities": (["text"],),
}
"""Fields that are known and not supported, and the values besides null that ask for nothing."""


LINE_START = '{"id": "batch_req_'
"""What every line of the output begins with."""


class BadLine(ValueError):  # named after what the caller has in hand
    """A line of the input that cannot be run.

    Attributes:
        custom_id: its id, as far as it could be read.
    """

    def __init__(self, message: str, custom_id: str | None = None):
        super().__init__(message)
        self.custom_id = custom_id


class Decoder(Protocol):
    """What gives tokens their text; a tokenizer."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        ...


@dataclass(frozen=True)
class BatchRequest:
    """A line of the input, understood.

    Attributes:
        custom_id: the user's name for it.
        url: `CHAT_URL` or `COMPLETIONS_URL`.
        prompt: a text, token ids, or chat messages.
        params: how to sample.
    """

    custom_id: str
    url: str
    prompt: Any
    params: SamplingParams


def parse_line(line: bytes, defaults: Mapping[str, Any]) -> BatchRequest:
    """Reads a line of the input; `defaults` are sampling fields for what its body leaves out.

    Raises:
        BadLine: it cannot be run; says why.
    """
    try:
        # Some editors begin a file with a byte order mark.
        fields = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BadLine(f"the line is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise BadLine("the line is not a JSON object; write custom_id, method, url and body")
    custom_id = fields.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise BadLine(f"custom_id is {custom_id!r}; give each line a text of its own")
    try:
        return _request(custom_id, fields, defaults)
    except Exception as error:  # whatever a line makes happen is the line's alone
        raise BadLine(str(error) or type(error).__name__, custom_id) from error


def _request(
    custom_id: str, fields: Mapping[str, Any], defaults: Mapping[str, Any]
) -> BatchRequest:
    method, url, body = fields.get("method", "POST"), fields.get("url"), fields.get("body")
    if method != "POST":
        raise ValueError(f"method is {method!r}; only POST is known")
    if url not in (CHAT_URL, COMPLETIONS_URL):
        raise ValueError(f"url is {url!r}; known are {CHAT_URL} and {COMPLETIONS_URL}")
    if not isinstance(body, dict):
        raise ValueError("body is missing or not an object; put the request there")
    chat = url == CHAT_URL
    prompt = _messages(body) if chat else _prompt(body)
    named = {name: value for name, value in body.items() if value is not None}
    named.pop("messages" if chat else "prompt")
    sampling = dict(defaults)
    if (limit := named.pop("max_completion_tokens", None)) is not None:
        if named.get("max_tokens", limit) != limit:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        named["max_tokens"] = limit
    sampling |= _logprobs(named, chat)
    for name, value in named.items():
        if name in _SAMPLING_FIELDS:
            sampling[name] = value
        elif name in _ONLY_VALUES:
            if value not in _ONLY_VALUES[name]:
                raise ValueError(f"{name}={value!r} is not supported; leave it out")
        elif name not in _IGNORED_FIELDS:
            raise ValueError(f"unknown field {name!r} in body; check its name or leave it out")
    return BatchRequest(custom_id, url, prompt, SamplingParams.from_dict(sampling))


def _logprobs(named: dict[str, Any], chat: bool) -> dict[str, int]:
    """Takes the fields about log probabilities; the two APIs disagree on their kinds."""
    wanted = named.pop("logprobs", None)
    top = named.pop("top_logprobs", None)
    if not chat:
        if top is not None:
            raise ValueError(f"top_logprobs belongs to {CHAT_URL}; give logprobs a number here")
        return {} if wanted is None else {"logprobs": wanted}
    if wanted is not None and not isinstance(wanted, bool):
        raise ValueError(f"logprobs={wanted!r}: true or false, with the number in top_logprobs")
    if top is not None and not wanted:
        raise ValueError("top_logprobs needs logprobs: true; add it")
    return {"logprobs": top or 0} if wanted else {}


def _prompt(body: Mapping[str, Any]) -> Any:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and all(type(token) is int for token in prompt):
        return prompt
    if isinstance(prompt, list) and all(isinstance(part, str | list) for part in prompt):
        raise ValueError(f"prompt has {len(prompt)} prompts; give each a line of its own")
    raise ValueError("prompt is missing or neither a text nor a list of token ids; give one")


def _messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages is missing or empty; give a list of objects with role, content")
    return [_message(i, message) for i, message in enumerate(messages)]


def _message(index: int, message: Any) -> dict[str, Any]:
    """A message with its content as one text, which is what chat templates expect."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"messages[{index}] has no role; write an object with role and content")
    content = message.get("content")
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(parts) < len(content):
            raise ValueError(f"messages[{index}] has parts that are no text; only text is read")
        content = "".join(str(part.get("text", "")) for part in parts)
    if not isinstance(content, str):
        raise ValueError(f"messages[{index}] has no content; give a text")
    return {**message, "content": content}


def success_line(
    request: BatchRequest,
    output: RequestOutput,
    *,
    line_id: str,
    model: str,
    created: int,
    decoder: Decoder | None,
) -> str:
    """The output line of a request that ran, without a line end.

    Args:
        request: what was asked.
        output: what came out.
        line_id: the id of the line; see `line_id_of`.
        model: the name to report.
        created: seconds since 1970.
        decoder: gives tokens their text in log probabilities; needed where those were asked for.
    """
    chat = request.url == CHAT_URL
    generated = sum(len(completion.token_ids) for completion in output.outputs)
    prompt = len(output.prompt_token_ids)
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
        "object": "chat.completion" if chat else "text_completion",
        "created": created,
        "model": model,
        "choices": [_choice(completion, chat, decoder) for completion in output.outputs],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
        },
    }
    return _line(line_id, request.custom_id, 200, body)


def failure_line(custom_id: str | None, message: str, *, line_id: str, status: int = 400) -> str:
    """The output line of a request that did not run (400) or failed (500), without a line end."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": None, "code": None}
    return _line(line_id, custom_id, status, {"error": error})


def line_id_of(number: int) -> str:
    """The id of the output line for a line of the input; the same in every run."""
    return f"batch_req_{number}"


def line_key(line: str) -> str:
    """What an output line stands for: its custom_id, or the line's id where that has none.

    Raises:
        BadLine: it is no line of a batch output.
    """
    try:
        fields = json.loads(line)
        key = fields["custom_id"] or fields["id"]
        fields["response"]["status_code"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BadLine("it is no line of a batch output") from error
    return str(key)


def _line(line_id: str, custom_id: str | None, status: int, body: Mapping[str, Any]) -> str:
    response = {"status_code": status, "request_id": f"req_{uuid.uuid4().hex}", "body": body}
    line = {"id": line_id, "custom_id": custom_id, "response": response, "error": None}
    text = json.dumps(line, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        # A custom_id may hold half of a surrogate pair, which only an escape can write.
        text = json.dumps(line)
    return text


def _choice(completion: CompletionOutput, chat: bool, decoder: Decoder | None) -> dict[str, Any]:
    entries = completion.logprobs
    logprobs: dict[str, Any] | None = None
    if entries is not None and decoder is not None:
        logprobs = _chat_logprobs(entries, decoder) if chat else _text_logprobs(entries, decoder)
    said: dict[str, Any] = (
        {"message": {"role": "assistant", "content": completion.text}}
        if chat
        else {"text": completion.text}
    )
    return {
        "index": completion.index,
        **said,
        "finish_reason": completion.finish_reason,
        "logprobs": logprobs,
    }


def _chat_logprobs(entries: tuple[TokenLogprobs, ...], decoder: Decoder) -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = _text(token, decoder)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    content = [
        {**entry(e.token_id, e.logprob), "top_logprobs": [entry(t, p) for t, p in e.top]}
        for e in entries
    ]
    return {"content": content}


def _text_logprobs(entries: tuple[TokenLogprobs, ...], decoder: Decoder) -> dict[str, Any]:
    tokens = [_text(e.token_id, decoder) for e in entries]
    offsets, end = [], 0
    for token in tokens:
        offsets.append(end)
        end += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [e.logprob for e in entries],
        "top_logprobs": [{_text(t, decoder): p for t, p in e.top} for e in entries],
        "text_offset": offsets,
    }


def _text(token: int, decoder: Decoder) -> str:
    return decoder.decode([token], skip_special_tokens=False)
