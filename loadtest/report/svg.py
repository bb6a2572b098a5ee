"""The elements of drawings as SVG, in the page's colors."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass

from loadtest.report.look import Look, resolved

FONT = 12
"""Height of a drawing's letters, in its units, which are a browser's pixels at full width."""

_LETTER = 0.6 * FONT  # mean width of a letter in the wider ones of common sans-serif fonts


@dataclass(frozen=True, slots=True)
class Size:
    """The size of a drawing.

    Attributes:
        width: in its units.
        height: of axes and labels; a legend below adds to it.
        narrow: it is for a phone: fewer ticks, names below instead of beside.
    """

    width: float
    height: float
    narrow: bool = False


WIDE = Size(720, 400)
HALF = Size(520, 350)
NARROW = Size(350, 330, narrow=True)


def element(tag: str, content: str = "", /, **attributes: object) -> str:
    """One element; underscores in names of attributes become hyphens, numbers lose needless digits."""
    pairs = "".join(
        f' {name.strip("_").replace("_", "-")}="{shown(value)}"' for name, value in attributes.items()
    )
    return f"<{tag}{pairs}>{content}</{tag}>" if content else f"<{tag}{pairs}/>"


def words(
    text: str, x: float, y: float, anchor: str = "start", color: str = "var(--ink)", **more: object
) -> str:
    """A line of text."""
    return element(
        "text", html.escape(text), x=x, y=y, text_anchor=anchor, fill=color, **{"font_size": FONT, **more}
    )


def over(text: str, x: float, y: float, anchor: str, color: str = "var(--ink)", **more: object) -> str:
    """A line of text with the page's color around its letters, so that it can be read over lines."""
    edge = {"stroke": "var(--card)", "stroke_width": 3.5, "stroke_opacity": 0.8, "paint_order": "stroke"}
    return words(text, x, y, anchor, color, **edge, stroke_linejoin="round", **more)


def width_of(text: str) -> float:
    """About how wide a line of text is; fonts differ."""
    return len(text) * _LETTER


def shortened(text: str, letters: int) -> str:
    """The text, or its beginning and end around an ellipsis: names often differ only in their ends."""
    if len(text) <= letters:
        return text
    head = letters // 2 - 1
    return f"{text[:head].rstrip()}…{text[len(text) - (letters - head - 1) :].lstrip()}"


def marker(look: Look, x: float, y: float, radius: float = 5.5, hollow: bool = False) -> str:
    """A series' mark; a hollow one has the page's color inside."""
    style: dict[str, object] = {
        "fill": "var(--card)" if hollow else look.color,
        "stroke": look.color,
        "stroke_width": 2 if hollow else 1,
    }
    if look.shape == "circle":
        return element("circle", cx=x, cy=y, r=radius, **style)
    if look.shape in ("plus", "cross"):
        turn = 0.0 if look.shape == "plus" else 45.0
        arms = _polygon(x, y, radius * 1.1, 4, turn)
        path = f"M{pair(arms[0])}L{pair(arms[2])}M{pair(arms[1])}L{pair(arms[3])}"
        return element("path", d=path, fill="none", stroke=look.color, stroke_width=3.2 - hollow)
    if look.shape == "star":
        tips, dents = _polygon(x, y, radius * 1.35, 5, -90), _polygon(x, y, radius * 0.6, 5, -54)
        corners = [corner for pair in zip(tips, dents, strict=True) for corner in pair]
    elif look.shape == "bar":
        corners = [
            (x + radius * across * 0.55, y + radius * up * 1.3)
            for across, up in ((-1, -1), (1, -1), (1, 1), (-1, 1))
        ]
    else:
        count, turn, scale = {
            "square": (4, 45.0, 1.3),
            "triangle": (3, -90.0, 1.3),
            "diamond": (4, 0.0, 1.3),
            "down": (3, 90.0, 1.3),
            "pentagon": (5, -90.0, 1.15),
            "hexagon": (6, 0.0, 1.15),
        }[look.shape]
        corners = _polygon(x, y, radius * scale, count, turn)
    return element("polygon", points=" ".join(map(pair, corners)), stroke_linejoin="round", **style)


def standalone(svg: str) -> str:
    """A drawing as a file of its own, in a light page's colors on white."""
    head, _, rest = svg.partition(">")
    return resolved(f'{head} style="background:#fff">{rest}') + "\n"


def pair(place: tuple[float, float]) -> str:
    """A place as paths write it."""
    return f"{shown(place[0])},{shown(place[1])}"


def shown(value: object) -> str:
    """An attribute's value; numbers without needless digits."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else html.escape(str(value))


def _polygon(x: float, y: float, radius: float, corners: int, turn: float) -> list[tuple[float, float]]:
    angles = [math.radians(turn + 360 * corner / corners) for corner in range(corners)]
    return [(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in angles]
