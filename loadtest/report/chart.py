"""Drawings with two axes: lines, intervals, markers, bars and names."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence

from loadtest.measuring.types import Interval
from loadtest.report.look import Look
from loadtest.report.scale import Axis
from loadtest.report.svg import FONT, Size, element, marker, pair, shortened, shown, width_of, words

NAMES = 178.0
"""Room beside the axes that names of lines take."""

_LETTERS = 22


def room_for(names: Iterable[str], size: Size) -> float:
    """Room to keep free beside the axes: enough for these names, or a little if they stand below."""
    beside = not size.narrow and all(len(name) <= _LETTERS for name in names)
    return NAMES if beside else 12.0


class Chart:
    """A drawing with two axes, filled by its methods in the order of their calls.

    Args:
        size: of all.
        x: horizontal axis.
        y: vertical axis; its low end is at the bottom.
        right: room beside the axes, for names.
        grid: lines across at the vertical axis' ticks.
    """

    def __init__(self, size: Size, x: Axis, y: Axis, *, right: float = 12, grid: bool = True) -> None:
        self.size, self.x, self.y = size, x, y
        self._y_ticks = y.ticked(5 if size.narrow else 7)
        widest = max((width_of(y.show(tick)) for tick in self._y_ticks), default=0)
        self.left, self.right = max(34.0, widest + 14), size.width - right
        self.top, self.bottom = 30.0, size.height - 44
        self._parts: list[str] = []
        self._below = 0.0
        self._axes(grid)

    def at_x(self, value: float) -> float:
        """Where a value is, from the left; beyond the axis at its end."""
        return self.left + self.x.share(self.x.inside(value)) * (self.right - self.left)

    def at_y(self, value: float) -> float:
        """Where a value is, from the top; beyond the axis at its end."""
        return self.bottom - self.y.share(self.y.inside(value)) * (self.bottom - self.top)

    def add(self, part: str) -> None:
        """Adds an element of the caller's."""
        self._parts.append(part)

    def band(self, low: float, high: float, color: str) -> None:
        """Tints what lies between two values of the vertical axis."""
        top, bottom = sorted((self.at_y(low), self.at_y(high)))
        self.add(
            element(
                "rect",
                x=self.left,
                y=top,
                width=self.right - self.left,
                height=bottom - top,
                fill=color,
                fill_opacity=0.09,
            )
        )

    def rule(
        self, *, x: float | None = None, y: float | None = None, color: str = "var(--dim)", dash: str = ""
    ) -> None:
        """A line across, at a value of one axis."""
        x1, x2 = (self.left, self.right) if x is None else (self.at_x(x),) * 2
        y1, y2 = (self.top, self.bottom) if y is None else (self.at_y(y),) * 2
        self._line(x1, y1, x2, y2, color, 1.4, dash)

    def line(
        self,
        points: Sequence[tuple[float, float]],
        look: Look,
        width: float = 2,
        stepped: bool = False,
        filled: bool = False,
    ) -> None:
        """A line through points with two finite values.

        Args:
            points: in the order in which they are joined.
            look: its color and dashes.
            width: of the line.
            stepped: each value holds until the next.
            filled: the area below it is tinted.
        """
        places = [(self.at_x(x), self.at_y(y)) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        if len(places) < 2:
            return
        path = f"M{pair(places[0])}"
        for x, y in places[1:]:
            path += f"H{shown(x)}V{shown(y)}" if stepped else f"L{pair((x, y))}"
        if filled:
            below = f"{path}V{shown(self.bottom)}H{shown(places[0][0])}Z"
            self.add(element("path", d=below, fill=look.color, fill_opacity=0.13))
        dash = {"stroke_dasharray": look.dash} if look.dash else {}
        style = {"fill": "none", "stroke": look.color, "stroke_width": width, "stroke_linejoin": "round"}
        self.add(element("path", d=path, **style, **dash))

    def interval(self, x: tuple[float, float], y: tuple[float, float], color: str) -> None:
        """A bar from one point to another along an axis, with feet where it ends within it."""
        x1, x2, y1, y2 = self.at_x(x[0]), self.at_x(x[1]), self.at_y(y[0]), self.at_y(y[1])
        self._line(x1, y1, x2, y2, color, 1.6)
        for value_x, value_y in zip(x, y, strict=True):
            if self.x.inside(value_x) == value_x and self.y.inside(value_y) == value_y:
                at_x, at_y = self.at_x(value_x), self.at_y(value_y)
                across = (0, 3.5) if y1 == y2 else (3.5, 0)
                self._line(at_x - across[0], at_y - across[1], at_x + across[0], at_y + across[1], color, 1.6)

    def point(
        self, x: float, y: float, look: Look, note: str, hollow: bool = False, radius: float = 5.5
    ) -> None:
        """A marker; its note shows when it is pointed at."""
        drawn = marker(look, self.at_x(x), self.at_y(y), radius, hollow)
        self.add(element("g", element("title", html.escape(note)) + drawn))

    def series(
        self, estimates: Sequence[tuple[float, Interval]], look: Look, note: Callable[[float, Interval], str]
    ) -> None:
        """A line of estimates, each with its interval and a marker whose note says what it is."""
        self.line([(x, found.value) for x, found in estimates], look)
        for x, found in estimates:
            if found.claimed:
                self.interval((x, x), (found.low, found.high), look.color)
            if math.isfinite(found.value):
                self.point(x, found.value, look, note(x, found))

    def leader(self, x1: float, y1: float, x2: float, y2: float) -> None:
        """A thin line between two places, from a mark to its name."""
        self._line(x1, y1, x2, y2, "var(--dim)", 0.8)

    def names(self, ends: Sequence[tuple[float, str, Look]]) -> None:
        """Names of lines: beside the axes, if the drawing has kept room for them there, else below."""
        if self.right < self.size.width - NAMES / 2:
            self._names_beside(ends)
        else:
            self.names_below([(name, look) for _, name, look in ends])

    def _names_beside(self, ends: Sequence[tuple[float, str, Look]]) -> None:
        """Each as near as possible to the value where its line ends."""
        wanted = sorted((self.at_y(value), name, look) for value, name, look in ends if math.isfinite(value))
        gap, places = FONT + 5.0, [place for place, _, _ in wanted]
        for index in range(1, len(places)):
            places[index] = max(places[index], places[index - 1] + gap)
        if places and places[-1] > self.bottom:
            places[-1] = self.bottom
            for index in range(len(places) - 2, -1, -1):
                places[index] = min(places[index], places[index + 1] - gap)
        for (value, name, look), place in zip(wanted, places, strict=True):
            if abs(value - place) > 2:
                self.leader(self.right + 3, value, self.right + 12, place)
            self.add(marker(look, self.right + 19, place, 4.5))
            self.add(words(shortened(name, _LETTERS), self.right + 29, place + FONT * 0.35))

    def names_below(self, entries: Iterable[tuple[str, Look]]) -> None:
        """A legend below the axes, in as many rows as it needs."""
        x, y = self.left, self.size.height + 6
        for name, look in entries:
            name = shortened(name, 40)
            wide = width_of(name) + 32
            if x > self.left and x + wide > self.size.width:
                x, y = self.left, y + FONT + 8
            self.add(marker(look, x + 6, y, 4.5))
            self.add(words(name, x + 17, y + FONT * 0.35))
            x += wide
        self._below = y + FONT - self.size.height

    def svg(self, key: str, title: str, description: str) -> str:
        """The drawing.

        Args:
            key: unique in the page.
            title: what it shows, for readers who can't see it.
            description: what is to be seen in it.
        """
        names = element("title", html.escape(title), id=f"{key}-title")
        names += element("desc", html.escape(description), id=f"{key}-desc")
        return element(
            "svg",
            names + "".join(self._parts),
            viewBox=f"0 0 {shown(self.size.width)} {shown(self.size.height + self._below)}",
            role="img",
            aria_labelledby=f"{key}-title {key}-desc",
            font_family="system-ui, sans-serif",
            xmlns="http://www.w3.org/2000/svg",
        )

    def _axes(self, grid: bool) -> None:
        for tick in self._y_ticks:
            at = self.at_y(tick)
            if grid:
                self._line(self.left, at, self.right, at, "var(--line)", 1)
            self.add(words(self.y.show(tick), self.left - 7, at + FONT * 0.35, "end", "var(--dim)"))
        self._line(self.left, self.bottom, self.right, self.bottom, "var(--dim)", 1)
        reached = -math.inf
        for tick in self.x.ticked(5 if self.size.narrow else 9):
            at, text = self.at_x(tick), self.x.show(tick)
            if at - width_of(text) / 2 < reached + 6:
                continue
            reached = at + width_of(text) / 2
            self._line(at, self.bottom, at, self.bottom + 4, "var(--dim)", 1)
            self.add(words(text, at, self.bottom + 17, "middle", "var(--dim)"))
        self.add(words(self.y.label, 2, 14, color="var(--dim)"))
        self.add(words(self.x.label, self.right, self.bottom + 36, "end", color="var(--dim)"))

    def _line(
        self, x1: float, y1: float, x2: float, y2: float, color: str, width: float, dash: str = ""
    ) -> None:
        dashes = {"stroke_dasharray": dash} if dash else {}
        self.add(element("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke=color, stroke_width=width, **dashes))
