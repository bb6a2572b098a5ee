"""Names beside points, none of them over another, over a point or beyond the edge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_DIRECTIONS = ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1))
_DISTANCES = (10, 16, 26, 38, 52, 70, 92)


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle.

    Attributes:
        left: edge.
        top: edge.
        right: edge.
        bottom: edge.
    """

    left: float
    top: float
    right: float
    bottom: float

    def shared(self, other: Box) -> float:
        """Area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)

    def anchor(self, x: float) -> tuple[str, float]:
        """How and where a line of text in it is anchored that names a point at ``x``."""
        if self.left < x < self.right:
            return "middle", (self.left + self.right) / 2
        return ("end", self.right) if self.right <= x else ("start", self.left)

    @property
    def area(self) -> float:
        """Its own."""
        return (self.right - self.left) * (self.bottom - self.top)


def place(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    room: Box,
    taken: Sequence[Box] = (),
) -> list[Box]:
    """Where each point's name goes: as near as nothing is in its way.

    Args:
        points: in pixels.
        sizes: width and height of each name.
        room: that all stay within.
        taken: where no name may lie; where there is no other place, where it covers least.
    """
    marks = [Box(x - 8, y - 8, x + 8, y + 8) for x, y in points]
    placed: list[Box] = []
    for number, ((x, y), (width, height)) in enumerate(zip(points, sizes, strict=True)):
        others = [*marks[:number], *marks[number + 1 :], *placed]
        best, least = None, math.inf
        for far in _DISTANCES:
            for across, down in _DIRECTIONS:
                box = _beside(x, y, width, height, across * far, down * far)
                covered = sum(box.shared(other) for other in others) * 4
                covered += sum(box.shared(other) for other in taken)
                covered += (box.area - box.shared(room)) * 8
                if covered + far * 0.01 < least:
                    best, least = box, covered + far * 0.01
            if least < 1:
                break
        assert best is not None
        placed.append(best)
    return placed


def _beside(x: float, y: float, width: float, height: float, across: float, down: float) -> Box:
    left = x + across if across > 0 else x + across - width if across < 0 else x - width / 2
    top = y + down if down > 0 else y + down - height if down < 0 else y - height / 2
    return Box(left, top, left + width, top + height)
