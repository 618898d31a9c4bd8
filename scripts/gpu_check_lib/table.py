"""The short table that comes last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_WIDTH = 44


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Stages with what each found: a mark for every bar, + met, x missed."""
    lines = []
    for name, result in found.items():
        reason = f": {result['reason']}" if result["reason"] else ""
        lines.append(f"{name}: {result['status']} in {result.get('seconds', 0):g} s{reason}")
        for row in result["rows"]:
            mark = {True: "+", False: "x", None: " "}[row["met"]]
            bar = f"  [{row['bar']}]" if row["bar"] else ""
            lines.append(f"  {mark} {row['what']:<{_WIDTH}} {row['value']}{bar}")
    bars = [row["met"] for result in found.values() for row in result["rows"] if row["bar"]]
    lines.append(f"bars met: {sum(bool(met) for met in bars)} of {len(bars)}")
    return "\n".join(lines) + "\n"
