"""HTML documents that need nothing else, and drawings in them."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure

_WIDTH, _HEIGHT = 7.2, 3.6
_INK, _GRAY = "#222222", "#9aa5b1"

COLORS = ("#222222", "#1f6fb4", "#d9822b", "#3a9a5b", "#a8447f", "#7b61c9", "#8a6d3b", "#2aa3a3", "#c23b3b")
"""For the lines of a drawing, one after the other."""


def plot(title: str, draw: Callable[[Any], None], caption: str) -> str:
    """A section with a drawing as SVG; ``draw`` gets matplotlib's axes."""
    drawing = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    axes = drawing.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK, labelsize=8)
    axes.grid(axis="y", color=_GRAY, alpha=0.3)
    axes.set_axisbelow(True)
    draw(axes)
    image = io.StringIO()
    drawing.savefig(image, format="svg", metadata={"Date": None})
    svg = image.getvalue()
    head = f"<h2>{text(title)}</h2><p class='dim'>{text(caption)}</p>"
    return f"<section>{head}{svg[svg.index('<svg') :]}</section>"


def page(title: str, body: Sequence[str]) -> str:
    """An HTML document of these parts, which are HTML themselves."""
    return "\n".join(
        [
            "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
            "<meta name='viewport' content='width=device-width'>",
            f"<title>Longspan: {text(title)}</title><style>{_STYLE}</style></head><body><main>",
            f"<h1>{text(title)}</h1>",
            *body,
            "</main></body></html>",
        ]
    )


def text(value: object) -> str:
    """Anything as text in HTML."""
    return html.escape(str(value))


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 2rem; }
main { max-width: 60rem; margin: auto; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-bottom: 0; }
.advice { font-size: 1.1rem; font-weight: 600; max-width: 50rem; }
.dim { color: #667; font-size: .85rem; margin-top: .2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { white-space: nowrap; } .facts td { white-space: normal; }
th, td { padding: .25rem .6rem; text-align: right; vertical-align: bottom; }
tbody tr { border-top: 1px solid #dde; } tr.bad { color: #b00; }
small { color: #667; font-weight: normal; }
.facts th, .facts td { text-align: left; vertical-align: top; font-size: .85rem; }
section { display: inline-block; width: 100%; } svg { max-width: 100%; height: auto; }
"""
