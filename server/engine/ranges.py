"""The values that sampling parameters may have."""

from __future__ import annotations

import math
from collections.abc import Callable

_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": ("at least 0", lambda value: value >= 0),
    "top_p": ("above 0 and at most 1", lambda value: 0 < value <= 1),
    "min_p": ("from 0 to 1", lambda value: 0 <= value <= 1),
    # 0.01 arrives as a float32, which is a little less.
    "repetition_penalty": ("from 0.01 to 100", lambda value: 0.009999 <= value <= 100),
    "presence_penalty": ("from -2 to 2", lambda value: -2 <= value <= 2),
    "frequency_penalty": ("from -2 to 2", lambda value: -2 <= value <= 2),
}

RANGED = tuple(_RANGES)
"""Parameters that are real numbers of a range."""


def violation(name: str, value: float) -> str | None:
    """What is wrong with a value of a parameter of ``RANGED``, as the end of a sentence; else ``None``."""
    words, inside = _RANGES[name]
    if math.isfinite(value) and inside(value):
        return None
    return f"is {value:g}; it must be a number {words}"
