"""What an answer has to look like: `response_format`, our own `structured`, and forced calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from ellm_jax.serving.errors import ErrorKind, ServiceError
from ellm_jax.serving.http.errors import HttpError
from ellm_jax.serving.http.requests import Common
from ellm_jax.serving.settings import ServeConfig
from ellm_jax.structured.output import StructuredOutput

_ANY_OBJECT = {"type": "object"}


def form_of(
    asked: Common, forced: Mapping[str, Any] | None, config: ServeConfig
) -> StructuredOutput | None:
    """What the answer to a request has to be; None for anything.

    Args:
        asked: the request.
        forced: the schema of calls that are forced; None where none are.
        config: the server's bounds.

    Raises:
        HttpError, ServiceError: more than one form, none that makes sense, or one that is too
            large or too deep.
    """
    found: dict[str, StructuredOutput] = {}
    if forced is not None:
        found["tools"] = _made("tools", json_schema=forced)
    wanted = asked.response_format
    if wanted is not None and wanted.type == "json_object":
        found["response_format"] = StructuredOutput(json_schema=_ANY_OBJECT)
    elif wanted is not None and wanted.type == "json_schema":
        if wanted.json_schema is None:
            raise HttpError(
                400, "json_schema is missing; put the schema there", param="response_format"
            )
        schema = wanted.json_schema.schema
        found["response_format"] = _schema(
            _ANY_OBJECT if schema is None else schema, "response_format", config
        )
    if asked.structured is not None:
        given = asked.structured
        for source in (given.json_schema, given.regex, given.grammar, given.choice):
            if source is not None:
                _check(source, "structured", config)
        found["structured"] = _made("structured", **msgspec.structs.asdict(given))
    if len(found) > 1:
        names = " and ".join(found)
        raise HttpError(400, f"{names} exclude each other; leave one out", param=names.split()[0])
    return next(iter(found.values()), None)


def _schema(schema: Mapping[str, Any], param: str, config: ServeConfig) -> StructuredOutput:
    _check(schema, param, config)
    return _made(param, json_schema=schema)


def _made(param: str, **fields: Any) -> StructuredOutput:
    try:
        return StructuredOutput(**fields)
    except (ValueError, TypeError) as error:
        raise HttpError(400, str(error), param=param) from error


def _check(
    source: str | Sequence[str] | Mapping[str, Any], param: str, config: ServeConfig
) -> None:
    """Holds a form to the server's bounds, before anything is done with it."""
    size = len(source.encode() if isinstance(source, str) else msgspec.json.encode(source))
    if size > config.max_schema_bytes:
        raise ServiceError(
            ErrorKind.TOO_LARGE,
            f"{param} has {size} bytes, and this server takes {config.max_schema_bytes}",
            param=param,
        )
    check_depth(source, param, config.max_schema_depth)


def check_depth(value: Any, param: str, most: int) -> None:
    """Refuses JSON in which more than so many objects and lists are inside each other.

    Raises:
        HttpError: it is too deep.
    """
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(most):
        level = [
            part
            for whole in level
            for part in (whole.values() if isinstance(whole, dict) else whole)
            if isinstance(part, dict | list)
        ]
        if not level:
            return
    raise HttpError(400, f"{param} is nested deeper than {most} levels; flatten it", param=param)
