"""What `ellm top` draws."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ellm_jax.config import format_bytes

_OWNERS = {
    "weights": "bright_black",
    "workspace": "white",
    "kv": "blue",
    "cache": "cyan",
    "activation": "yellow",
    "free": "default",
}
_EVENTS_OVER = 60
_SPARKS = "▁▂▃▄▅▆▇█"
_WIDTH_MIN, _WIDTH_MAX = 40, 120

_Snapshot = dict[str, Any]


def view(
    status: dict[str, Any], history: Sequence[_Snapshot], width: int, problem: str = ""
) -> RenderableType:
    """The whole picture, `width` columns wide.

    Args:
        status: what the server said last.
        history: snapshots, oldest first.
        problem: why there is nothing newer; empty: all is well.
    """
    width = max(_WIDTH_MIN, min(_WIDTH_MAX, width))
    parts: list[RenderableType] = [_title(status, history, problem)]
    if not history:
        return Group(*parts, Text("no snapshot yet", style="dim"))
    now = history[-1]
    parts += [Text(), _memory(now, width), Text(), _figures(now, history, width)]
    events = _events(history)
    if events is not None:
        parts += [Text(), events]
    return Group(*parts)


def _title(status: dict[str, Any], history: Sequence[_Snapshot], problem: str) -> Text:
    text = Text.assemble(("ellm ", "bold"), (_plain(status.get("model", "")), "dim"))
    if history:
        clock = time.strftime("%H:%M:%S", time.localtime(history[-1]["time_s"]))
        text.append(f"  {clock}", "dim")
    if problem:
        text.append(f"  {problem}", "bold red")
    elif history and history[-1]["asleep"]:
        text.append("  asleep", "bold yellow")
    return text


def _memory(now: _Snapshot, width: int) -> RenderableType:
    limit = max(1, now["limit_bytes"])
    used = limit - now["device"]["free"]
    head = Text.assemble(
        ("Device memory  ", "bold"),
        f"{format_bytes(used)} of {format_bytes(limit)}",
        (f"  {100 * used / limit:.0f} %", "dim"),
    )
    bar = Text()
    # Ends are rounded, not lengths: so the bar is never longer than it should be.
    begin, total = 0, 0
    for owner, style in _OWNERS.items():
        total += now["device"][owner]
        end = round(width * total / limit)
        bar.append(("░" if owner == "free" else "█") * (end - begin), style)
        begin = end
    table = Table.grid(padding=(0, 3, 0, 0))
    rows = [(owner, style, now["device"][owner]) for owner, style in _OWNERS.items()]
    cells = [
        Text.assemble(("■ " if owner != "free" else "□ ", style), f"{owner:<11}", _size(count))
        for owner, style, count in rows
    ]
    columns = 3 if width >= 84 else 2
    for i in range(0, len(cells), columns):
        table.add_row(*cells[i : i + columns])
    parts: list[RenderableType] = [head, bar, table]
    if now["host_limit_bytes"]:
        parts += [Text(), *_host(now, width)]
    return Group(*parts)


def _host(now: _Snapshot, width: int) -> list[RenderableType]:
    limit, used = now["host_limit_bytes"], now["host_used_bytes"]
    filled = round(width * used / limit)
    bar = Text.assemble(("█" * filled, "magenta"), "░" * (width - filled))
    head = Text.assemble(
        ("Host memory    ", "bold"),
        f"{format_bytes(used)} of {format_bytes(limit)}",
        (f"  {100 * used / limit:.0f} %", "dim"),
    )
    return [head, bar]


def _figures(now: _Snapshot, history: Sequence[_Snapshot], width: int) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", width=13)
    table.add_column(justify="right", width=22)
    table.add_column(no_wrap=True)
    room = width - 40
    waiting = now["waiting"] + now["queued"]
    away = now["offloaded"] + now["moving"]
    rows: list[tuple[str, str, Callable[[_Snapshot], float | None], str]] = [
        ("Running", str(now["running"]), lambda s: s["running"], "blue"),
        ("Waiting", str(waiting), lambda s: s["waiting"] + s["queued"], "yellow"),
        ("In host mem.", str(away), lambda s: s["offloaded"] + s["moving"], "magenta"),
        (
            "Output",
            f"{now['output_tokens_per_s']:,.0f} tokens/s",
            _field("output_tokens_per_s"),
            "blue",
        ),
        (
            "Prompt",
            f"{now['prompt_tokens_per_s']:,.0f} tokens/s",
            _field("prompt_tokens_per_s"),
            "cyan",
        ),
        ("First token", _latency(now["ttft_ms"]), _median("ttft_ms"), "blue"),
        ("Each token", _latency(now["tpot_ms"]), _median("tpot_ms"), "cyan"),
    ]
    for name, value, of, style in rows:
        table.add_row(name, value, Text(_sparkline([of(s) for s in history], room), style))
    return table


def _field(name: str) -> Callable[[_Snapshot], float | None]:
    return lambda snapshot: snapshot[name]


def _median(name: str) -> Callable[[_Snapshot], float | None]:
    return lambda snapshot: snapshot[name]["p50"] if snapshot[name] else None


def _latency(values: dict[str, float] | None) -> str:
    return f"{_ms(values['p50'])}, p95 {_ms(values['p95'])}" if values else "-"


def _ms(ms: float) -> str:
    if ms >= 1000:
        return f"{ms / 1000:.1f} s"
    return f"{ms:.0f} ms" if ms >= 100 else f"{ms:.1f} ms"


def _events(history: Sequence[_Snapshot]) -> RenderableType | None:
    """What moved in the last minute; None: nothing did."""
    since = history[-1]["time_s"] - _EVENTS_OVER
    totals: dict[str, list[int]] = {}
    for snapshot in history:
        if snapshot["time_s"] > since:
            for kind, move in snapshot["moves"].items():
                total = totals.setdefault(kind, [0, 0])
                total[0] += move["count"]
                total[1] += move["bytes"]
    if not totals:
        return None
    table = Table.grid(padding=(0, 2, 0, 0))
    for kind, (count, moved) in sorted(totals.items()):
        table.add_row(_plain(kind), f"{count:>6} x", _size(moved))
    return Group(Text("Moves of memory in the last minute", style="bold"), table)


def _sparkline(values: Sequence[float | None], width: int) -> str:
    values = values[-max(0, width) :] if width > 0 else []
    most = max((value for value in values if value is not None), default=0)
    if most <= 0:
        return ""
    steps = len(_SPARKS) - 1
    return "".join(
        " " if value is None else _SPARKS[round(steps * max(0.0, value) / most)] for value in values
    )


def _size(count_bytes: int) -> str:
    sign = "-" if count_bytes < 0 else ""
    return f"{sign + format_bytes(abs(count_bytes)):>11}"


def _plain(text: object) -> str:
    """What a server sends must not steer the terminal."""
    return "".join(char for char in str(text)[:200] if char.isprintable())
