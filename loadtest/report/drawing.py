"""Drawings in a page: one for screens, one for phones, of which the page shows what fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from loadtest.document import write
from loadtest.report.chart import Chart
from loadtest.report.look import look
from loadtest.report.svg import NARROW, WIDE, Size, element, marker, standalone


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure of a page.

    Attributes:
        key: unique in the page.
        title: what it shows.
        caption: how to read it.
        wide: SVG for screens.
        narrow: SVG for phones.
    """

    key: str
    title: str
    caption: str
    wide: Markup
    narrow: Markup

    def write(self, path: Path) -> None:
        """Writes the drawing for screens as a file of its own, in the colors of a light page.

        Raises:
            OSError: it can't be written.
        """
        write(standalone(str(self.wide)), path)


def drawing(
    key: str,
    title: str,
    caption: str,
    draw: Callable[[Size], Chart],
    description: str = "",
    wide: Size = WIDE,
) -> Drawing:
    """Draws both forms.

    Args:
        key: unique in the page.
        title: what it shows.
        caption: how to read it.
        draw: gives the chart of a size.
        description: what is to be seen in it, for readers who can't see it; the caption unless given.
        wide: size for screens.
    """
    svgs = [
        Markup(draw(size).svg(f"{key}-{name}", title, description or caption))
        for name, size in (("wide", wide), ("narrow", NARROW))
    ]
    return Drawing(key, title, caption, *svgs)


def icon(number: int) -> Markup:
    """The mark of the ``number``-th series, as high as a letter."""
    drawn = marker(look(number), 8, 8, 5)
    return Markup(element("svg", drawn, class_="icon", viewBox="0 0 16 16", aria_hidden="true"))
