"""Draws docs/memory.svg, the picture of the README: `python scripts/draw_memory.py`."""

from pathlib import Path

TARGET = Path(__file__).parent.parent / "docs" / "memory.svg"

WIDTH, HEIGHT, LEFT = 960, 560, 30
SLOTS_LEFT, SLOTS_TOP, SLOT_STEP, TILE = 190, 92, 44, 35
POOL_TOP, POOL_HEIGHT = 412, 46
TILES_IN_SLOT = 21

INK, PALE = "#1f2933", "#c3cad2"
GREY, ORANGE, HATCHED, NONE = "#8a929c", "#e08a32", "url(#hatch)", "none"
A, B, C = "#1d4f91", "#4f93d8", "#2aa198"

SLOTS = [("request A", 6, A), ("request B", 3, B), ("request C", 10, C)]
SLOTS += [("ended, still mapped", 4, HATCHED), ("not used", 0, NONE)]
# Requests grow in turns, so their chunks lie mixed: that is what the virtual addresses hide.
KV = [A, A, C, C, B, C, A, C, C, B, A, C, C, A, C, B, C, A, C]
POOL = [("weights", [GREY] * 6), ("KV cache", KV), ("available", [HATCHED] * 4)]
POOL += [("activations", [ORANGE] * 4), ("free", [NONE] * 7)]


def text(x: float, y: float, words: str, size: int = 14, **attributes: str) -> str:
    extra = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in attributes.items())
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}"{extra}>{words}</text>'


def box(x: float, y: float, width: float, height: float, fill: str) -> str:
    line = f'stroke="{PALE}" stroke-dasharray="3 3"' if fill == NONE else f'stroke="{INK}"'
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2" fill="{fill}" '
        f"{line}/>"
    )


def slots() -> list[str]:
    """The address range, a slot per row, a box per tile."""
    parts = [
        text(LEFT, 44, "Virtual addresses: a slot per request, as long as the longest context", 18),
        text(LEFT, 68, "Reserving addresses costs nothing. One box is a tile of 16 to 64 tokens."),
    ]
    for row, (name, mapped, fill) in enumerate(SLOTS):
        y = SLOTS_TOP + row * SLOT_STEP
        parts.append(text(SLOTS_LEFT - 14, y + 20, name, text_anchor="end"))
        for column in range(TILES_IN_SLOT):
            x = SLOTS_LEFT + column * TILE
            parts.append(box(x, y, TILE - 4, 30, fill if column < mapped else NONE))
    return parts


def mapping() -> list[str]:
    """What joins the two."""
    top = SLOTS_TOP + len(SLOTS) * SLOT_STEP + 6
    return [
        f'<path d="M{LEFT + 14} {POOL_TOP - 52} V{top}" stroke="{INK}" stroke-width="3" '
        f'fill="none" marker-end="url(#arrow)"/>',
        text(LEFT + 34, top + 26, "a chunk is mapped under a tile just before a step writes to it"),
    ]


def pool() -> list[str]:
    """The chunks, by owner."""
    step = (WIDTH - 2 * LEFT) / sum(len(fills) for _, fills in POOL)
    heading = "Physical memory: one pool of chunks, as large as you allow"
    parts = [text(LEFT, POOL_TOP - 18, heading, 18)]
    x = float(LEFT)
    for name, fills in POOL:
        parts += [
            box(x + i * step, POOL_TOP, step - 3, POOL_HEIGHT, fill) for i, fill in enumerate(fills)
        ]
        middle = x + len(fills) * step / 2
        parts.append(text(middle, POOL_TOP + POOL_HEIGHT + 20, name, text_anchor="middle"))
        x += len(fills) * step
    below = POOL_TOP + POOL_HEIGHT + 56
    more = "Texts that grow take chunks on the right; so do the activations of a step with a long"
    return [
        *parts,
        text(LEFT, below, f"{more} prompt, which give them back after it."),
        text(
            LEFT,
            below + 22,
            "free (with available) + kv + cache + activation + weights + workspace = limit, "
            "to the byte, at every step",
        ),
    ]


HEADER = f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" \
font-family="Helvetica, Arial, sans-serif" fill="{INK}" role="img">
<title>Virtual tensors: slots of addresses above, one pool of physical chunks below</title>
<defs>
<pattern id="hatch" width="7" height="7" patternUnits="userSpaceOnUse" \
patternTransform="rotate(45)"><rect width="7" height="7" fill="#e9edf2"/>\
<rect width="3" height="7" fill="#7f9cc0"/></pattern>
<marker id="arrow" viewBox="0 0 8 8" refX="5" refY="4" markerWidth="5" markerHeight="5" \
orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{INK}"/></marker>
</defs>
<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="#ffffff"/>
"""


if __name__ == "__main__":
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(HEADER + "\n".join([*slots(), *mapping(), *pool()]) + "\n</svg>\n")
