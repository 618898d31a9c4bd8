"""The error of this package."""

from __future__ import annotations

from collections.abc import Collection


class CheckpointError(ValueError):
    """A checkpoint that cannot be read: what was asked, what there is, and one remedy."""


def a_few(names: Collection[str], most: int = 4) -> str:
    """The first names in order, and how many more there are."""
    shown = ", ".join(sorted(names)[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
