"""Looks of lines and points: a color and a shape each, so that either tells them apart.

Colors are Okabe and Ito's (Color Universal Design, 2008), which people with any color vision tell apart,
darkened for light pages and lightened for dark ones until each has a contrast of 3 against the page.
"""

from __future__ import annotations

from dataclasses import dataclass

LIGHT = {
    "page": "#f6f7f8",
    "card": "#ffffff",
    "ink": "#1b1f24",
    "dim": "#57606a",
    "line": "#dde1e6",
    "accent": "#0a58a8",
    "safe": "#0b6e4f",
    "unsafe": "#b3340b",
    "unknown": "#6b5900",
    "series-0": "#1b1f24",
    "series-1": "#0072b2",
    "series-2": "#d55e00",
    "series-3": "#00855f",
    "series-4": "#b0508c",
    "series-5": "#a87000",
    "series-6": "#2f8fc4",
    "series-7": "#757000",
}
"""Colors of a light page, by name."""

DARK = {
    "page": "#0e1114",
    "card": "#171b20",
    "ink": "#e8ebee",
    "dim": "#a2acb8",
    "line": "#2d343c",
    "accent": "#79b8ff",
    "safe": "#4cc79a",
    "unsafe": "#ff8f66",
    "unknown": "#e0c341",
    "series-0": "#e8ebee",
    "series-1": "#4aa3dc",
    "series-2": "#f08a3c",
    "series-3": "#2fbf92",
    "series-4": "#dd8fbd",
    "series-5": "#e6a82e",
    "series-6": "#8fd0f5",
    "series-7": "#e4d84a",
}
"""Colors of a dark page, by the same names."""

_SHAPES = (
    "circle",
    "square",
    "triangle",
    "diamond",
    "down",
    "pentagon",
    "plus",
    "star",
    "cross",
    "hexagon",
    "bar",
)
_COLORS = 8


@dataclass(frozen=True, slots=True)
class Look:
    """How one series is drawn.

    Attributes:
        color: CSS, one of the page's variables.
        shape: of its markers; see ``loadtest.report.svg.marker``.
        dash: of its lines, for ``stroke-dasharray``; empty for a solid one.
    """

    color: str
    shape: str
    dash: str = ""


def look(number: int) -> Look:
    """The look of the ``number``-th series; the first belongs to the baseline."""
    # Color 0 belongs only to the baseline.
    color = number if number < _COLORS else 1 + (number - 1) % (_COLORS - 1)
    return Look(f"var(--series-{color})", _SHAPES[number % len(_SHAPES)], "" if number < _COLORS else "5 3")


def variables(colors: dict[str, str]) -> str:
    """The colors as CSS."""
    return " ".join(f"--{name}: {value};" for name, value in colors.items())


def resolved(svg: str) -> str:
    """A drawing with the light page's colors in place of the variables."""
    for name, value in LIGHT.items():
        svg = svg.replace(f"var(--{name})", value)
    return svg
