"""Finds calls of tools in what a model writes, as it writes it.

Two formats of open models: Hermes (also of Qwen), with each call as JSON between tags, and that of
Llama 3, whose answer is nothing but JSON. Where a call is forced, the answer is JSON in a form of
our own choosing, whatever the model's.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from ellm_jax.tokenizer import Tokenizer

ToolFormat = Literal["hermes", "llama3"]

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_PYTHON_TAG = "<|python_tag|>"


@dataclass(frozen=True)
class Call:
    """A call of a tool.

    Attributes:
        id: made here.
        name: of the function.
        arguments: JSON, as a text.
    """

    id: str
    name: str
    arguments: str


class CallReader(Protocol):
    """Splits an answer into text and calls."""

    def feed(self, text: str) -> list[str | Call]:
        """Takes the next piece; what it completes, in order."""
        ...

    def finish(self) -> list[str | Call]:
        """What is left when no more comes."""
        ...


def format_of(tokenizer: Tokenizer | None) -> ToolFormat | None:
    """The format that a checkpoint's chat template teaches; None where it takes no tools."""
    templates = () if tokenizer is None else tokenizer.chat_templates.values()
    for source in templates:
        if "tools" in source:
            if _OPEN in source:
                return "hermes"
            if _PYTHON_TAG in source or "ipython" in source:
                return "llama3"
    return None


def reader_of(form: ToolFormat, names: Collection[str]) -> CallReader:
    """Reads answers in a format; calls of other functions than `names` are text."""
    return HermesReader(names) if form == "hermes" else LlamaReader(names)


class Objects:
    """Cuts a growing text into its outermost JSON objects, by counting braces once."""

    def __init__(self) -> None:
        self._text = ""
        self._at = self._depth = 0
        self._quoted = self._escaped = False

    @property
    def rest(self) -> str:
        """The text that is in no whole object yet."""
        return self._text

    def feed(self, text: str) -> Iterator[tuple[str, str]]:
        """Takes the next piece; yields what stood before an object, and the object."""
        self._text += text
        begin = -1 if self._depth == 0 else self._text.index("{")
        while self._at < len(self._text):
            char = self._text[self._at]
            self._at += 1
            if self._depth == 0:
                if char == "{":
                    begin, self._depth = self._at - 1, 1
            elif self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped = char == "\\"
                self._quoted = char != '"'
            elif char == '"':
                self._quoted = True
            elif char in "{}":
                self._depth += 1 if char == "{" else -1
                if self._depth == 0:
                    before, whole = self._text[:begin], self._text[begin : self._at]
                    self._text, self._at = self._text[self._at :], 0
                    yield before, whole


class HermesReader:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, with text around it."""

    def __init__(self, names: Collection[str]):
        self._names = names
        self._held = ""
        self._inside = self._called = False

    def feed(self, text: str) -> list[str | Call]:
        """Takes the next piece; what could become a tag, and space before it, is held back."""
        self._held += text
        found: list[str | Call] = []
        while True:
            before, tag, after = self._held.partition(_CLOSE if self._inside else _OPEN)
            if not tag:
                break
            if self._inside:
                self._called = True
                found.append(_call(before, self._names) or f"{_OPEN}{before}{_CLOSE}")
            elif before.strip():
                found.append(before.rstrip())
            self._held, self._inside = after, not self._inside
        if not self._inside:
            sure = len(self._held) - _undecided_chars(self._held, _OPEN)
            sure = len(self._held[:sure].rstrip())
            if sure:
                found.append(self._held[:sure])
                self._held = self._held[sure:]
        return found

    def finish(self) -> list[str | Call]:
        """A call whose closing tag the end of the answer stands for, or text as it is."""
        held, self._held = self._held, ""
        if self._inside:
            return [_call(held, self._names) or _OPEN + held]
        # Space is held back for a call that may come, and dropped only behind one.
        return [held] if held.strip() or (held and not self._called) else []


class LlamaReader:
    """`{"name": ..., "parameters": {...}}`, several with `;` between; else it is all text."""

    def __init__(self, names: Collection[str]):
        self._names = names
        self._objects = Objects()
        self._start: str | None = ""  # None once it is decided
        self._calls = False

    def feed(self, text: str) -> list[str | Call]:
        """Takes the next piece; an answer that begins like a call is held until it is one."""
        if self._start is not None:
            self._start += text
            begun = self._start.lstrip()
            if len(begun) < len(_PYTHON_TAG) and _PYTHON_TAG.startswith(begun):
                return []
            self._calls = begun.startswith(("{", _PYTHON_TAG))
            text = begun.removeprefix(_PYTHON_TAG) if self._calls else self._start
            self._start = None
        if not self._calls:
            return [text] if text else []
        found: list[str | Call] = []
        for before, whole in self._objects.feed(text):
            call = _call(whole, self._names)
            if call is None:
                found.append(before + whole)
            else:
                if before.strip(" \t\r\n;"):
                    found.append(before)
                found.append(call)
        return found

    def finish(self) -> list[str | Call]:
        """What never became a call, as text."""
        rest = self._start if self._start is not None else self._objects.rest
        self._start = None
        return [rest] if rest and rest.strip(" \t\r\n;") else []


class ListReader:
    """`[{"name": ..., "arguments": {...}}, ...]`: what a forced call is made to look like."""

    def __init__(self, names: Collection[str]):
        self._names = names
        self._objects = Objects()

    def feed(self, text: str) -> list[str | Call]:
        """Takes the next piece."""
        found: list[str | Call] = []
        for _, whole in self._objects.feed(text):
            found.append(_call(whole, self._names) or whole)
        return found

    def finish(self) -> list[str | Call]:
        """Nothing: a call that was cut off is none."""
        return []


class ArgumentsReader:
    """The arguments of the one function that had to be called, and nothing else."""

    def __init__(self, name: str):
        self._name = name
        self._pieces: list[str] = []

    def feed(self, text: str) -> list[str | Call]:
        """Takes the next piece."""
        self._pieces.append(text)
        return []

    def finish(self) -> list[str | Call]:
        """The call; its arguments are cut off where the answer was."""
        return [Call(_new_id(), self._name, "".join(self._pieces))]


def _new_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def _call(text: str, names: Collection[str]) -> Call | None:
    """The call that a text of JSON stands for; None if it does not."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or value.get("name") not in names:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif not isinstance(arguments, str):
        return None
    return Call(_new_id(), value["name"], arguments)


def _undecided_chars(text: str, tag: str) -> int:
    """Length of the longest end of a text that the tag begins with."""
    for length in range(min(len(text), len(tag) - 1), 0, -1):
        if tag.startswith(text[-length:]):
            return length
    return 0
