"""Tables of figures for terminals of any width, and how they write a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

_LEAST_NAME = 18  # columns for names; longer ones fold where room is short
_GAP = 1


def figure(value: float) -> str:
    """Three significant digits; a dash where there is no figure."""
    if not math.isfinite(value):
        return "-"
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 0.1 or value == 0:
        return f"{value:.1f}" if size >= 10 else f"{value:.2f}"
    return f"{value:.3g}" if size >= 1e-4 else f"{value:.1e}"


class Columns:
    """A table that loses no column and no digit: columns beyond the line's width go below.

    Each part repeats the names. Only names fold, if they are long.

    Args:
        name: head of the first column, which has the rows' names.
        heads: of the columns of figures.
    """

    def __init__(self, name: str, heads: Sequence[str]) -> None:
        self._name, self._heads = name, [Text(head) for head in heads]
        self._rows: list[list[Text]] = []

    def add_row(self, name: str | Text, *figures: str | Text) -> None:
        """Adds a row; fewer figures than heads leave the last ones empty."""
        cells = [cell if isinstance(cell, Text) else Text(cell) for cell in (name, *figures)]
        self._rows.append(cells + [Text()] * (1 + len(self._heads) - len(cells)))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        def width(cells: Sequence[Text]) -> int:
            return max(Measurement.get(console, options, cell).maximum for cell in cells)

        widths = [
            _GAP + width([head, *(row[place] for row in self._rows)])
            for place, head in enumerate(self._heads, start=1)
        ]
        names = width([Text(self._name), *(row[0] for row in self._rows)])
        if names + sum(widths) > options.max_width:
            names = min(names, max(_LEAST_NAME, options.max_width - sum(widths)))
            names = max(1, min(names, options.max_width - max(widths)))
        for number, places in enumerate(_parts(widths, options.max_width - names)):
            if number:
                yield Text()
            yield self._part(names, places)

    def _part(self, names: int, places: Sequence[int]) -> Table:
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, _GAP, 0, 0))
        table.add_column(self._name, width=names, overflow="fold")
        for place in places:
            table.add_column(self._heads[place], justify="right", no_wrap=True)
        for row in self._rows:
            table.add_row(row[0], *(row[place + 1] for place in places))
        return table


def _parts(widths: Sequence[int], room: int) -> list[list[int]]:
    """Groups of columns that stand beside each other: as many as fit, at least one."""
    parts: list[list[int]] = [[]]
    left = room
    for place, width in enumerate(widths):
        if parts[-1] and width > left:
            parts.append([])
            left = room
        parts[-1].append(place)
        left -= width
    return parts
