"""The OpenAPI document of the HTTP API, made from the types that requests are checked against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import StructMeta

from ellm_jax import __version__
from ellm_jax.serving.http import replies, requests

_JSON = "application/json"
_PAGE = ("limit", "after", "order")
_PARAMETERS: dict[str, dict[str, Any]] = {
    "limit": {"type": "integer", "minimum": 1, "maximum": 1000},
    "after": {"type": "string", "maxLength": 64},
    "order": {"type": "string", "enum": ["asc", "desc"]},
    "purpose": {"type": "string", "maxLength": 64},
}
_UPLOAD = {
    "type": "object",
    "properties": {
        "purpose": {"type": "string", "enum": ["batch"]},
        "file": {"type": "string", "format": "binary"},
    },
    "required": ["purpose", "file"],
}


@dataclass(frozen=True)
class _Operation:
    """What may be done with a path.

    Attributes:
        summary: in a line.
        reply: what comes back in JSON; None for bytes, or nothing but errors.
        body: what is sent in JSON; None for nothing.
        query: names of parameters.
        streams: the reply may be a stream of events.
        uploads: a form is sent.
        never: it is always refused.
        open: no key is needed.
    """

    summary: str
    reply: StructMeta | None = None
    body: StructMeta | None = None
    query: tuple[str, ...] = ()
    streams: bool = False
    uploads: bool = False
    never: bool = False
    open: bool = False


_OPERATIONS: dict[tuple[str, str], _Operation] = {
    ("get", "/health"): _Operation("Whether the process should live on", replies.State, open=True),
    ("get", "/ready"): _Operation("Whether new work is taken", replies.State),
    ("get", "/v1/models"): _Operation("The models that are served", replies.ModelList),
    ("get", "/v1/models/{model}"): _Operation("One model", replies.Model),
    ("post", "/v1/completions"): _Operation(
        "Continue prompts", replies.Completion, requests.CompletionRequest, streams=True
    ),
    ("post", "/v1/chat/completions"): _Operation(
        "Answer chats", replies.ChatCompletion, requests.ChatRequest, streams=True
    ),
    ("post", "/v1/embeddings"): _Operation("Not supported: always 404", never=True),
    ("post", "/tokenize"): _Operation(
        "Token ids of a text", replies.Tokens, requests.TokenizeRequest
    ),
    ("post", "/detokenize"): _Operation(
        "The text of token ids", replies.Text, requests.DetokenizeRequest
    ),
    ("get", "/v1/files"): _Operation(
        "Your files, newest first", replies.FileList, query=(*_PAGE, "purpose")
    ),
    ("post", "/v1/files"): _Operation("Upload a file", replies.FileObject, uploads=True),
    ("get", "/v1/files/{id}"): _Operation("One file", replies.FileObject),
    ("delete", "/v1/files/{id}"): _Operation("Delete a file", replies.Deleted),
    ("get", "/v1/files/{id}/content"): _Operation("What a file holds"),
    ("get", "/v1/batches"): _Operation("Your batches", replies.BatchList, query=_PAGE),
    ("post", "/v1/batches"): _Operation("Begin a batch", replies.Batch, requests.BatchCreate),
    ("get", "/v1/batches/{id}"): _Operation("One batch", replies.Batch),
    ("post", "/v1/batches/{id}/cancel"): _Operation("End a batch", replies.Batch),
    ("get", "/openapi.json"): _Operation("This document"),
}


def document() -> bytes:
    """The document, as JSON."""
    types = {replies.ErrorReply, replies.Completion, replies.ChatChunk}
    for operation in _OPERATIONS.values():
        types |= {form for form in (operation.reply, operation.body) if form is not None}
    ordered = sorted(types, key=lambda form: form.__name__)
    schemas, components = msgspec.json.schema_components(
        ordered, ref_template="#/components/schemas/{name}"
    )
    schema_of = dict(zip(ordered, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for (method, path), operation in _OPERATIONS.items():
        paths.setdefault(path, {})[method] = _described(method, path, operation, schema_of)
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {
                "title": "ellm_jax",
                "version": __version__,
                "description": "OpenAI's API, with the sampling fields of vLLM beside its own.",
            },
            "paths": paths,
            "components": {
                "schemas": components,
                "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            },
            "security": [{"key": []}],
        }
    )


def _described(
    method: str, path: str, operation: _Operation, schema_of: dict[StructMeta, dict[str, Any]]
) -> dict[str, Any]:
    name = "_".join([method, *(part.strip("{}") for part in path.split("/") if part)])
    said: dict[str, Any] = {"operationId": name.replace(".", "_"), "summary": operation.summary}
    parameters: list[dict[str, Any]] = [
        {"name": each, "in": "query", "schema": _PARAMETERS[each]} for each in operation.query
    ]
    parameters += [
        {"name": part.strip("{}"), "in": "path", "required": True, "schema": {"type": "string"}}
        for part in path.split("/")
        if part.startswith("{")
    ]
    if parameters:
        said["parameters"] = parameters
    if operation.body is not None:
        content = {_JSON: {"schema": schema_of[operation.body]}}
        said["requestBody"] = {"required": True, "content": content}
    elif operation.uploads:
        said["requestBody"] = {
            "required": True,
            "content": {"multipart/form-data": {"schema": _UPLOAD}},
        }
    error = {
        "description": "why not",
        "content": {_JSON: {"schema": schema_of[replies.ErrorReply]}},
    }
    said["responses"] = {"4XX": error, "5XX": error}
    if not operation.never:
        schema = schema_of[operation.reply] if operation.reply is not None else {}
        kind = "application/octet-stream" if path.endswith("/content") else _JSON
        content = {kind: {"schema": schema} if schema else {}}
        if operation.streams:
            content["text/event-stream"] = {"schema": {"type": "string"}}
        said["responses"]["200"] = {"description": "done", "content": content}
    if operation.open:
        said["security"] = []
    return said
