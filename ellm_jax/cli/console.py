"""What commands share on the terminal: errors in plain words, and reading and writing lines."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

STANDARD = "-"
"""The name of standard input or output among file names."""


class Failure(Exception):
    """Ends a command with a message for people.

    Attributes:
        exit_code: 2 where what was asked makes no sense, 1 where it failed.
    """

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turns the errors with which the engine refuses what it is given into a `Failure`.

    Only for calls into the engine: around a command's own code it would hide mistakes.
    """
    from ellm_jax.engine import EngineClosed

    try:
        yield
    except (ValueError, TypeError, MemoryError, FileNotFoundError, PermissionError) as error:
        raise Failure(str(error) or type(error).__name__) from error
    except EngineClosed as error:
        raise Failure(str(error), exit_code=1) from error


@contextlib.contextmanager
def reading(name: str) -> Iterator[TextIO]:
    """A text file to read, or standard input for "-"."""
    shown = "standard input" if name == STANDARD else name
    file: contextlib.AbstractContextManager[TextIO]
    if name == STANDARD:
        if isinstance(sys.stdin, io.TextIOWrapper):
            # In some locales Python reads anything, and makes what is no text of it.
            sys.stdin.reconfigure(encoding="utf-8", errors="strict")
        file = contextlib.nullcontext(sys.stdin)
    else:
        try:
            file = Path(name).open(encoding="utf-8")  # noqa: SIM115  # closed below; errors differ
        except OSError as error:
            raise Failure(f"{name} cannot be read: {error.strerror}; check the path") from error
    with file as lines:
        try:
            yield lines
        except UnicodeDecodeError as error:
            raise Failure(f"{shown} is not UTF-8 text ({error}); convert it first") from error


def write_json(value: Any) -> None:
    """One line of JSON on standard output."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def note(text: str, *, quiet: bool = False) -> None:
    """A line for people, on stderr."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)
