"""What clients get back, as types: OpenAI's objects, field by field."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType


class PromptTokensDetails(Struct):
    """How many of the prompt's tokens were found in the prefix cache."""

    cached_tokens: int


class Usage(Struct):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(Struct):
    """One of the likeliest tokens; `bytes` is null for a token that is no whole text."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(Struct):
    """The token that was chosen, and the likeliest ones."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    """Log probabilities of a chat's answer, token by token."""

    content: list[TokenLogprob]
    refusal: None = None


class TextLogprobs(Struct):
    """Log probabilities of a completion, as lists of one length."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


FinishReason = Literal["stop", "length", "tool_calls"]


class TextChoice(Struct):
    """One completion; in a stream, what is new of it."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Completion(Struct):
    """The answer of /v1/completions, and a chunk of its stream."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | UnsetType | None = UNSET
    object: Literal["text_completion"] = "text_completion"


class FunctionCall(Struct):
    """A call of a function; the arguments are JSON, as a text."""

    name: str
    arguments: str


class ToolCall(Struct):
    """A call that the model asks for."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class ToolCallDelta(Struct):
    """A call in a stream; a call comes whole, in one chunk."""

    index: int
    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class ChatMessage(Struct):
    """The answer of a chat."""

    content: str | None
    tool_calls: list[ToolCall] | UnsetType = UNSET
    refusal: None = None
    role: Literal["assistant"] = "assistant"


class ChatChoice(Struct):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(Struct):
    """The answer of /v1/chat/completions."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | UnsetType = UNSET
    object: Literal["chat.completion"] = "chat.completion"


class Delta(Struct):
    """What is new of an answer."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChunkChoice(Struct):
    """What is new of one answer, and whether it is over."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(Struct):
    """A chunk of a chat's stream."""

    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


class Model(Struct):
    """The model that is served."""

    id: str
    created: int
    max_model_len: int
    object: Literal["model"] = "model"
    owned_by: str = "ellm_jax"


class ModelList(Struct):
    """The models that are served: one."""

    data: list[Model]
    object: Literal["list"] = "list"


class Tokens(Struct):
    """The answer of /tokenize."""

    tokens: list[int]
    count: int
    max_model_len: int


class Text(Struct):
    """The answer of /detokenize."""

    prompt: str


class State(Struct):
    """The answer of /health and /ready."""

    status: str


class Error(Struct):
    """What went wrong, as OpenAI says it."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(Struct):
    """The body of every answer that is no success."""

    error: Error


class FileObject(Struct):
    """A stored file."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    object: Literal["file"] = "file"
    status: Literal["processed"] = "processed"


class Deleted(Struct):
    """A file that is no more."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class FileList(Struct):
    """A page of files."""

    data: list[FileObject]
    has_more: bool
    first_id: str | None
    last_id: str | None
    object: Literal["list"] = "list"


class RequestCounts(Struct):
    """How far a batch is, in lines."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class BatchError(Struct):
    """Why a batch failed as a whole."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class BatchErrors(Struct):
    """Why a batch failed as a whole, as a list."""

    data: list[BatchError]
    object: Literal["list"] = "list"


BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "cancelling", "cancelled"
]


class Batch(Struct, kw_only=True):
    """A batch: a file of requests, run when there is time. Times are seconds since 1970."""

    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    status: BatchStatus
    created_at: int
    object: Literal["batch"] = "batch"
    errors: BatchErrors | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expires_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts
    metadata: dict[str, str] | None = None


class BatchList(Struct):
    """A page of batches."""

    data: list[Batch]
    has_more: bool
    first_id: str | None
    last_id: str | None
    object: Literal["list"] = "list"


class LineResponse(Struct):
    """The answer to one line of a batch."""

    status_code: int
    request_id: str
    body: Any


class LineResult(Struct):
    """A line of a batch's output or error file."""

    id: str
    custom_id: str | None
    response: LineResponse
    error: None = None
