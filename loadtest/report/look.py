"""Looks of lines and points: a color and a shape each, so that either tells them apart.

Colors are Okabe and Ito's (Color Universal Design, 2008), which people with any color vision tell apart,
darkened for light pages and lightened for dark ones until each has a contrast of 3 against the page.
"""

from __future__ import annotations

from dataclasses import dataclass

_COLORS = {
    "page": ("#f6f7f8", "#0e1114"),
    "card": ("#ffffff", "#171b20"),
    "ink": ("#1b1f24", "#e8ebee"),
    "dim": ("#57606a", "#a2acb8"),
    "line": ("#dde1e6", "#2d343c"),
    "accent": ("#0a58a8", "#79b8ff"),
    "safe": ("#0b6e4f", "#4cc79a"),
    "unsafe": ("#b3340b", "#ff8f66"),
    "unknown": ("#6b5900", "#e0c341"),
    "series-0": ("#1b1f24", "#e8ebee"),
    "series-1": ("#0072b2", "#4aa3dc"),
    "series-2": ("#d55e00", "#f08a3c"),
    "series-3": ("#00855f", "#2fbf92"),
    "series-4": ("#b0508c", "#dd8fbd"),
    "series-5": ("#a87000", "#e6a82e"),
    "series-6": ("#2f8fc4", "#8fd0f5"),
    "series-7": ("#757000", "#e4d84a"),
}
LIGHT, DARK = ({name: colors[page] for name, colors in _COLORS.items()} for page in (0, 1))
"""Colors of a light page and of a dark one, by the same names."""

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
_SERIES = 8


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
    color = number if number < _SERIES else 1 + (number - 1) % (_SERIES - 1)
    return Look(f"var(--series-{color})", _SHAPES[number % len(_SHAPES)], "" if number < _SERIES else "5 3")


def variables(colors: dict[str, str]) -> str:
    """The colors as CSS."""
    return " ".join(f"--{name}: {value};" for name, value in colors.items())


def resolved(svg: str) -> str:
    """A drawing with the light page's colors in place of the variables."""
    for name, value in LIGHT.items():
        svg = svg.replace(f"var(--{name})", value)
    return svg
