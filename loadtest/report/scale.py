"""From values to places on a drawing, and round numbers for the ticks between."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from loadtest.report import words

_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
_LOG_STEPS = ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a drawing.

    Attributes:
        label: its quantity and unit.
        low: value at its beginning.
        high: value at its end; where ``low`` is larger, values fall along the axis.
        log: places are by the logarithm.
        ticks: values with a tick; empty for round ones.
        show: a tick's words.
    """

    label: str
    low: float
    high: float
    log: bool = False
    ticks: tuple[float, ...] = ()
    show: Callable[[float], str] = words.plain

    def share(self, value: float) -> float:
        """Where a value is between the ends, 0 to 1; beyond them less or more."""
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(value)
        return (at - low) / (high - low)

    def inside(self, value: float) -> float:
        """The value, or the end that it lies beyond."""
        return max(min(self.low, self.high), min(max(self.low, self.high), value))

    def ticked(self, most: int) -> list[float]:
        """Values with a tick, ``most`` at most unless they are given."""
        if self.ticks:
            return list(self.ticks)
        low, high = min(self.low, self.high), max(self.low, self.high)
        return log_ticks(low, high, most) if self.log else round_ticks(low, high, most)


def round_ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from ``low`` to ``high``, ``most`` at most."""
    rough = (high - low) / max(most - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    for step in (factor * power for factor in (*_STEPS, 20.0, 25.0, 50.0)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            return [round(number * step, 12) for number in range(first, last + 1)]
    raise AssertionError("a step of 50 times the rough one is always enough")


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from ``low`` to ``high`` that are even by the logarithm, ``most`` at most."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    best: list[float] = []
    for factors in _LOG_STEPS:
        found = [factor * 10.0**decade for decade in decades for factor in factors]
        found = [tick for tick in found if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(found) <= most:
            best = found
    return best if len(best) > 1 else round_ticks(low, high, most)


def from_zero(label: str, values: Iterable[float], pad: float = 0.06) -> Axis:
    """An axis from 0 with room for the finite values among these."""
    return Axis(label, 0.0, span(values, include=(0.0,), pad=pad)[1])


def span(
    values: Iterable[float], *, include: Iterable[float] = (), pad: float = 0.06, log: bool = False
) -> tuple[float, float]:
    """Ends of an axis with room around the finite values among these.

    Args:
        values: to be shown.
        include: further values that the axis must have.
        pad: room on both sides, as a share of the whole.
        log: the axis is logarithmic.
    """
    known = [value for value in (*values, *include) if math.isfinite(value) and (value > 0 or not log)]
    if not known:
        return (1.0, 10.0) if log else (0.0, 1.0)
    low, high = min(known), max(known)
    if log:
        room = max((high / low) ** pad, 1.1)
        return low / room, high * room
    room = (high - low) * pad or abs(high) * 0.1 or 1.0
    return low - room, high + room
