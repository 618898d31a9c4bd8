"""Two ways to do something to every device: all or none, and all whatever happens."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

_log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")


def all_or_none(
    members: Sequence[T], act: Callable[[int, T], R], undo: Callable[[int, T, R], object]
) -> list[R]:
    """`act` on each member, with its number. If one refuses, those before it are undone.

    Args:
        members: one per device.
        act: changes nothing where it raises.
        undo: takes what `act` gave, too. Where it fails, that is logged.

    Raises:
        What `act` raised.
    """
    done: list[R] = []
    try:
        for index, member in enumerate(members):
            done.append(act(index, member))
    except BaseException:
        for index, result in reversed(list(enumerate(done))):
            with reported(index):
                undo(index, members[index], result)
        raise
    return done


def on_every(members: Sequence[T], act: Callable[[int, T], R]) -> list[R]:
    """`act` on each member, with its number, those after one that refuses too.

    Raises:
        What the first of them raised, once all have been gone through.
    """
    results: list[R] = []
    first: Exception | None = None
    for index, member in enumerate(members):
        try:
            results.append(act(index, member))
        except Exception as error:
            first = first or error
    if first is not None:
        raise first
    return results


@contextlib.contextmanager
def reported(index: int) -> Iterator[None]:
    """What the system refuses inside is logged and goes no further."""
    try:
        yield
    except RuntimeError as error:
        _log.warning("device %d: %s", index, error)
