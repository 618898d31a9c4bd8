"""What a chat's `tools`, `tool_choice` and `response_format` ask of its answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ellm_jax.serving.http.errors import HttpError
from ellm_jax.serving.http.forms import check_depth
from ellm_jax.serving.http.requests import ChatRequest, NamedTool, Tool
from ellm_jax.serving.http.tool_calls import (
    ArgumentsReader,
    CallReader,
    ListReader,
    ToolFormat,
    reader_of,
)
from ellm_jax.serving.settings import ServeConfig

_DEFINITIONS = ("$defs", "definitions")
_CALLS_MAX = 16
"""Most calls that an answer is forced to have room for."""


@dataclass(frozen=True)
class ToolUse:
    """How the tools of a chat are used.

    Attributes:
        names: of the functions; empty where none may be called.
        form: how the model writes calls of its own accord; None where it may not, or must.
        schema: what the answer has to be where calls are forced; None where they are not.
        forced: the one function that has to be called; None for any, or none.
    """

    names: tuple[str, ...] = ()
    form: ToolFormat | None = None
    schema: Mapping[str, Any] | None = None
    forced: str | None = None

    def reader(self) -> CallReader | None:
        """A new reader of answers; None where an answer is all text."""
        if self.forced is not None:
            return ArgumentsReader(self.forced)
        if self.schema is not None:
            return ListReader(self.names)
        return None if self.form is None else reader_of(self.form, self.names)


def tool_use(asked: ChatRequest, form: ToolFormat | None, config: ServeConfig) -> ToolUse:
    """How the tools of a chat are to be used.

    Args:
        asked: the chat.
        form: how the model writes calls; None where its template takes no tools.
        config: the server's bounds.

    Raises:
        HttpError: tools that the model cannot use, or a choice that makes no sense.
    """
    tools, choice = asked.tools or [], asked.tool_choice
    if not tools:
        if choice is not None and choice not in ("none", "auto"):
            raise HttpError(400, "tool_choice needs tools; add them", param="tool_choice")
        return ToolUse()
    for tool in tools:
        check_depth(tool.function.parameters, "tools", config.max_schema_depth)
    names = tuple(tool.function.name for tool in tools)
    if len(set(names)) < len(names):
        raise HttpError(400, "two tools have the same name; give each its own", param="tools")
    if choice == "none":
        return ToolUse()
    if form is None:
        raise HttpError(
            400,
            "the chat template of this model takes no tools; leave them out, or serve a model "
            "whose template knows the Hermes or the Llama 3 format",
            param="tools",
        )
    if choice is None or choice == "auto":
        return ToolUse(names, form)
    if isinstance(choice, NamedTool):
        named = next((tool for tool in tools if tool.function.name == choice.function.name), None)
        if named is None:
            raise HttpError(
                400,
                f"tool_choice names {choice.function.name!r}, which is not among the tools",
                param="tool_choice",
            )
        return ToolUse(names, schema=_parameters(named), forced=named.function.name)
    return ToolUse(names, schema=_list_schema(tools, asked.parallel_tool_calls is not False))


def _parameters(tool: Tool) -> dict[str, Any]:
    return tool.function.parameters or {"type": "object", "properties": {}}


def _list_schema(tools: Sequence[Tool], parallel: bool) -> dict[str, Any]:
    """The schema of a list of calls of any of the tools."""
    definitions: dict[str, Any] = {}
    calls = []
    for tool in tools:
        name = tool.function.name
        arguments = _renamed(_parameters(tool), f"{name}.")
        for place in _DEFINITIONS:
            found = arguments.pop(place, None)
            if isinstance(found, dict):
                definitions |= {f"{name}.{key}": value for key, value in found.items()}
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": arguments},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    most = _CALLS_MAX if parallel else 1
    schema = {"type": "array", "minItems": 1, "maxItems": most, "items": {"anyOf": calls}}
    return schema | ({"$defs": definitions} if definitions else {})


def _renamed(schema: Any, prefix: str) -> Any:
    """A copy whose references to definitions of its own point to where a list of tools has them."""
    if isinstance(schema, list):
        return [_renamed(each, prefix) for each in schema]
    if not isinstance(schema, dict):
        return schema
    renamed = {key: _renamed(value, prefix) for key, value in schema.items()}
    reference = renamed.get("$ref")
    if isinstance(reference, str):
        for place in _DEFINITIONS:
            start = f"#/{place}/"
            if reference.startswith(start):
                renamed["$ref"] = f"#/$defs/{prefix}{reference.removeprefix(start)}"
    return renamed
