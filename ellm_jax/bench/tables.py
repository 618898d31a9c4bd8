"""Tables of results for people: a row for each figure, a column for each result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ellm_jax.config import format_bytes

Row = tuple[str, Callable[[dict[str, Any]], str]]
"""A row of a table: its name, and how its value in a result is written."""


def columns(rows: Sequence[Row], results: dict[str, dict[str, Any]]) -> str:
    """A table with a column for each result."""
    cells = [[name, *(write(result) for result in results.values())] for name, write in rows]
    cells.insert(0, ["", *results])
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = (
        [row[0].ljust(widths[0])]
        + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        for row in cells
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)


def peak_row(name: str, owner: str) -> Row:
    """A row with the most bytes that an owner had."""
    return name, lambda result: format_bytes(int(result["memory_peak"][owner]))


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


LATENCY_ROWS: list[Row] = [
    ("TTFT mean ms", lambda r: _ms(r["ttft_ms"]["mean"])),
    ("TTFT p50 ms", lambda r: _ms(r["ttft_ms"]["p50"])),
    ("TTFT p99 ms", lambda r: _ms(r["ttft_ms"]["p99"])),
    ("TPOT mean ms", lambda r: _ms(r["tpot_ms"]["mean"])),
    ("TPOT p99 ms", lambda r: _ms(r["tpot_ms"]["p99"])),
]
"""The rows that every table with latencies has; each a `Spread` as JSON has it."""
