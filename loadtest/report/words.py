"""Figures as reports write them: three significant digits, with the unit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from loadtest.columns import figure
from loadtest.measuring.types import Interval, length_label

NONE = "\N{EN DASH}"
"""Where there is no figure."""


def plain(value: float) -> str:
    """A number with at most three significant digits and no zeros behind them."""
    if not math.isfinite(value):
        return NONE
    if abs(value) >= 1000:
        return _minus(f"{value:,.0f}")
    return _minus(f"{value:.3g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.1e}")


def number(value: float) -> str:
    """A number with three significant digits."""
    return _minus(figure(value)) if math.isfinite(value) else NONE


def seconds(value: float) -> str:
    """A time, in ms below one second."""
    if not math.isfinite(value):
        return NONE
    return f"{number(value * 1e3)} ms" if abs(value) < 1 else f"{number(value)} s"


def duration(value: float) -> str:
    """A time in minutes or hours where it is long."""
    if not math.isfinite(value):
        return NONE
    if value < 90:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"


def size(value: float) -> str:
    """Bytes."""
    if not math.isfinite(value):
        return NONE
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(value) >= scale:
            return f"{number(value / scale)} {unit}"
    return f"{value:.0f} B"


def ratio(value: float) -> str:
    """How many times."""
    return NONE if not math.isfinite(value) else f"{number(value)}\N{MULTIPLICATION SIGN}"


def share(value: float) -> str:
    """A part of the whole, or of what is allowed."""
    return NONE if not math.isfinite(value) else _minus(f"{value:.0%}")


def tokens(length: int) -> str:
    """A context length; a dash where there is none."""
    return length_label(length) if length else NONE


def measured(figure: str, value: float) -> str:
    """A figure of speed or memory, by its name."""
    if figure in ("ttft", "tpot"):
        return seconds(value)
    if figure == "bytes":
        return size(value)
    if figure == "fits":
        return NONE if not math.isfinite(value) else f"{value:,.0f}"
    unit = "tok/s per GiB" if figure == "memory_rate" else "tok/s"
    return NONE if not math.isfinite(value) else f"{number(value)} {unit}"


def quality(unit: str, value: float) -> str:
    """A figure of quality, by its unit: what one deployment has."""
    if not math.isfinite(value):
        return NONE
    if unit in ("score", "agreement"):
        return f"{value * 100:.1f}%"
    return number(value)


def loss(unit: str, value: float) -> str:
    """A loss against full attention, by its unit; a gain is negative."""
    if not math.isfinite(value):
        return NONE
    sign = "+" if value > 0 else ""
    if unit == "score":
        return _minus(f"{sign}{value * 100:.1f} points")
    if unit in ("perplexity", "agreement"):
        return _minus(f"{sign}{value * 100:.1f}%")
    return _minus(f"{sign}{value:.3f} nats" if unit == "logprob" else f"{sign}{number(value)}")


def ends(show: Callable[[float], str], found: Interval) -> str:
    """An estimate's interval in brackets; empty where there is no estimate either, and where it is exact."""
    if not math.isfinite(found.value):
        return ""
    if not found.claimed:
        return "(no interval)"
    if found.low == found.high == found.value:
        return ""
    return f"({_without_unit(show(found.low), show(found.high))} to {show(found.high)})"


def pairs(values: Mapping[str, Any]) -> str:
    """Facts by name, in one line."""
    names = {key: key.removesuffix("_bytes").replace("_", " ") for key in values}
    return ", ".join(f"{names[key]} {_fact(key, value)}" for key, value in values.items())


def _fact(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return pairs(value)
    if isinstance(value, int) and key.endswith("_bytes"):
        return size(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _without_unit(low: str, high: str) -> str:
    """The lower end without its unit, if the upper end has the same one."""
    unit = _unit(high)
    return low.removesuffix(unit) if unit and _unit(low) == unit else low


def _unit(text: str) -> str:
    """The unit behind the last digit."""
    digits = [place for place, letter in enumerate(text) if letter.isdigit()]
    return text[digits[-1] + 1 :] if digits else ""


def _minus(text: str) -> str:
    """With a minus sign as wide as the plus; negative zero is zero."""
    if text.startswith("-") and not any(digit in text for digit in "123456789"):
        text = text[1:]
    return text.replace("-", "\N{MINUS SIGN}") if text.startswith("-") else text
