"""Tests of one variant as rows of an interval plot, all to one scale: the margin is 1."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from markupsafe import Markup

from loadtest.compare.phrases import measure
from loadtest.compare.turns import Turns
from loadtest.compare.types import Evidence
from loadtest.compare.words import more_words
from loadtest.report import view, words
from loadtest.report.svg import element

_WIDTH, _HEIGHT = 220.0, 28.0
_LEFT, _RIGHT = -1.0, 2.5


def rows(evidence: Sequence[Evidence]) -> list[dict[str, Any]]:
    """The values that the page's template needs of each test."""
    return [
        {
            "measure": measure(one.measure),
            "length": words.tokens(one.length),
            "loss": words.loss(one.unit, one.loss.value),
            "ends": words.ends(partial(words.loss, one.unit), one.loss),
            "margin": words.loss(one.unit, one.margin),
            "count": one.loss.count,
            "contexts": one.contexts,
            "turns": turns_words(one.turns) if one.turns else "",
            "outcome": view.badge(one.outcome),
            "more": more_words(one),
            "where": one.where,
            "note": one.note,
            "plot": _plot(one),
        }
        for one in evidence
    ]


def turns_words(found: Turns) -> str:
    """The answers found by first and by later questions, and how many points more a later one loses."""
    asked = (
        f"{when} questions {words.plain(own)} of {count} (full {words.plain(full)})"
        for when, own, count, full in (
            ("first", found.first_own, found.first, found.first_full),
            ("later", found.later_own, found.later, found.later_full),
        )
    )
    show = partial(words.loss, "score")
    more = f"{show(found.difference.value)} {words.ends(show, found.difference)}".strip()
    return f"{', '.join(asked)}; a later one loses more by {more}"


def scale() -> Markup:
    """The scale that stands above the rows."""
    style = {"text_anchor": "middle", "font_size": 11, "fill": "var(--dim)"}
    marks = ((0.0, "as full"), (1.0, "margin"))
    return _svg((element("text", text, x=_x(value), y=12.0, **style) for value, text in marks), 16)


def lines() -> dict[str, str]:
    """Where full attention and the margin are in all rows, as shares of the plots' width, for their lines."""
    return {"zero": f"{_x(0.0) / _WIDTH:.4f}", "margin": f"{_x(1.0) / _WIDTH:.4f}"}


def _x(share: float) -> float:
    inside = min(max(share, _LEFT), _RIGHT)
    return 6 + (inside - _LEFT) / (_RIGHT - _LEFT) * (_WIDTH - 12)


def _plot(one: Evidence) -> Markup:
    kind, _ = view.BADGES[one.outcome]
    color, middle, used = f"var(--{kind})", _HEIGHT / 2, view.used(one)
    value, low, high = used.value, used.low, used.high
    parts: list[str] = []
    if math.isfinite(low) and (low > _RIGHT or high < _LEFT):
        parts.append(_beyond(low > _RIGHT, color))
    elif math.isfinite(low) and math.isfinite(high):
        style = {"stroke": color, "stroke_width": 2.4}
        parts.append(element("line", x1=_x(low), x2=_x(high), y1=middle, y2=middle, **style))
        for end, edge, inward in ((low, _LEFT, 1), (high, _RIGHT, -1)):
            # Feet where the interval ends, an arrow where it goes on beyond the edge.
            beyond = end < edge if inward > 0 else end > edge
            x = _x(end)
            back, up, down = x + 5 * inward, middle - 5, middle + 5
            arrow = f"M{back:.1f},{up}L{x:.1f},{middle}L{back:.1f},{down}"
            shape = arrow if beyond else f"M{x:.1f},{up}V{down}"
            parts.append(element("path", d=shape, fill="none", **style))
    if math.isfinite(value) and _LEFT <= value <= _RIGHT:
        parts.append(_mark(kind, _x(value), middle, color))
    return _svg(parts, _HEIGHT)


def _svg(parts: Iterable[str], height: float) -> Markup:
    box = f"0 0 {_WIDTH:.0f} {height:.0f}"
    return Markup(element("svg", "".join(parts), viewBox=box, class_="row-plot", aria_hidden="true"))


def _beyond(right: bool, color: str) -> str:
    """An arrow at the edge that all of the interval lies beyond."""
    x, turn, y = (_x(_RIGHT), -1, _HEIGHT / 2) if right else (_x(_LEFT), 1, _HEIGHT / 2)
    tip = f"M{x + 6 * turn:.1f},{y - 5}L{x:.1f},{y}L{x + 6 * turn:.1f},{y + 5}"
    shape = f"M{x + 16 * turn:.1f},{y}H{x:.1f}{tip}"
    return element("path", d=shape, fill="none", stroke=color, stroke_width=2.4)


def _mark(kind: str, x: float, y: float, color: str) -> str:
    """A disc where it is safe, a square where it is not, a ring where that is not known."""
    if kind == "unsafe":
        return element("rect", x=x - 4.5, y=y - 4.5, width=9, height=9, fill=color)
    inside = "var(--card)" if kind == "unknown" else color
    return element("circle", cx=x, cy=y, r=4.5, fill=inside, stroke=color, stroke_width=2)
