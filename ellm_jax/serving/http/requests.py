"""What clients may send, as types: OpenAI's fields, with the sampling fields of vLLM beside them.

A field that is not known is refused, since ignoring it could change an answer without a word. What
only bookkeeping reads (`user`, `metadata`, ...) is taken and ignored; what is known and not
supported is refused by `unsupported_fields`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Raw, Struct

MAX_MESSAGES = 4096
"""Most messages of one chat."""
MAX_TOOLS = 128
"""Most tools of one chat."""
MAX_CONTENT_PARTS = 1024
"""Most parts of one message's content."""
MAX_TEMPLATE_VARIABLES = 16
"""Most variables that a request may hand to the chat template."""

TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Meta(min_length=1)]
Name = Annotated[str, Meta(min_length=1, max_length=64, pattern="^[a-zA-Z0-9_.-]+$")]
Short = Annotated[str, Meta(max_length=512)]
Metadata = Annotated[dict[str, Short], Meta(max_length=16)]


class StreamOptions(Struct, forbid_unknown_fields=True):
    """How to stream.

    Attributes:
        include_usage: end with a chunk that counts tokens.
        include_obfuscation: taken and ignored: nothing is padded here.
    """

    include_usage: bool = False
    include_obfuscation: bool = False


class JsonSchema(Struct, forbid_unknown_fields=True):
    """The schema of a `response_format`."""

    name: Name
    schema: dict[str, Any] | None = None
    description: Annotated[str, Meta(max_length=4096)] | None = None
    strict: bool | None = None


class ResponseFormat(Struct, forbid_unknown_fields=True):
    """What the answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Structured(Struct, forbid_unknown_fields=True):
    """What the answer must match; exactly one is given. An extension of OpenAI's API."""

    json_schema: dict[str, Any] | None = None
    regex: Annotated[str, Meta(min_length=1)] | None = None
    grammar: Annotated[str, Meta(min_length=1)] | None = None
    choice: Annotated[list[str], Meta(min_length=1, max_length=1024)] | None = None


class Common(Struct, forbid_unknown_fields=True, kw_only=True):
    """What completions and chats have in common; see `SamplingParams` for the meaning."""

    model: Annotated[str, Meta(max_length=512)]
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=256)] | None = None
    ignore_eos: bool | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    return_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
    structured: Structured | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Bookkeeping: taken and ignored.
    user: Short | None = None
    metadata: Metadata | None = None
    store: bool | None = None
    service_tier: Short | None = None
    safety_identifier: Short | None = None
    prompt_cache_key: Short | None = None
    prompt_cache_retention: Short | None = None


class CompletionRequest(Common):
    """The body of /v1/completions."""

    prompt: str | Annotated[list[str | TokenId | TokenIds], Meta(min_length=1)]
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Meta(ge=1, le=128)] | None = None
    suffix: str | None = None


class ContentPart(Struct, forbid_unknown_fields=True):
    """A part of a message. Only text is read; others are refused with their name."""

    type: Annotated[str, Meta(max_length=64)]
    text: str | None = None
    refusal: str | None = None
    image_url: Any = None
    input_audio: Any = None
    file: Any = None


class CalledFunction(Struct, forbid_unknown_fields=True):
    """What the model called: the arguments are JSON, as a text."""

    name: Name
    arguments: str


class PastToolCall(Struct, forbid_unknown_fields=True):
    """A call in an assistant's earlier message."""

    id: Short
    function: CalledFunction
    type: Literal["function"] = "function"
    index: int | None = None


class Message(Struct, forbid_unknown_fields=True):
    """A message of a chat. Fields that clients copy from answers are taken and ignored."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[ContentPart], Meta(max_length=MAX_CONTENT_PARTS)] | None = None
    name: Short | None = None
    tool_calls: Annotated[list[PastToolCall], Meta(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Short | None = None
    refusal: str | None = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None
    reasoning_content: str | None = None


class FunctionDefinition(Struct, forbid_unknown_fields=True):
    """A function that the model may call; `parameters` is the JSON schema of its arguments."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct, forbid_unknown_fields=True):
    """Something that the model may call."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(Struct, forbid_unknown_fields=True):
    """The name of a function."""

    name: Name


class NamedTool(Struct, forbid_unknown_fields=True):
    """The one function that must be called."""

    type: Literal["function"]
    function: FunctionName


class ChatRequest(Common):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: (
        Annotated[
            dict[str, bool | int | float | Short | None], Meta(max_length=MAX_TEMPLATE_VARIABLES)
        ]
        | None
    ) = None
    modalities: list[Short] | None = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    functions: Any = None
    function_call: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    moderation: Any = None
    prompt_cache_options: Any = None


class TokenizeRequest(Struct, forbid_unknown_fields=True):
    """The body of /tokenize."""

    prompt: str
    model: Annotated[str, Meta(max_length=512)] | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(Struct, forbid_unknown_fields=True):
    """The body of /detokenize."""

    tokens: list[TokenId]
    model: Annotated[str, Meta(max_length=512)] | None = None
    skip_special_tokens: bool = False


class BatchCreate(Struct, forbid_unknown_fields=True):
    """The body of /v1/batches."""

    input_file_id: Short
    endpoint: Literal["/v1/chat/completions", "/v1/completions"]
    completion_window: Literal["24h"]
    metadata: Metadata | None = None


class BatchLine(Struct, forbid_unknown_fields=True):
    """A line of a batch's input file; the body is read later, by its endpoint."""

    custom_id: Annotated[str, Meta(min_length=1, max_length=512)]
    url: Short
    body: Raw
    method: Short = "POST"
