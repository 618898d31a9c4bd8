"""What `ellm doctor` tells: one thing that was looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        group: what it belongs to.
        name: what was looked at.
        level: "error" where the engine cannot work, "warning" where it works less well.
        value: what was found.
        remedy: what to do about it; empty where nothing is to be done.
    """

    group: str
    name: str
    level: Level
    value: str
    remedy: str = ""
