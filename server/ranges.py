"""The values that sampling parameters may have."""

from __future__ import annotations

from collections.abc import Callable

RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": ("at least 0", lambda value: value >= 0),
    "top_p": ("above 0 and at most 1", lambda value: 0 < value <= 1),
    "min_p": ("from 0 to 1", lambda value: 0 <= value <= 1),
    # 0.01 arrives as a float32, which is a little less.
    "repetition_penalty": ("from 0.01 to 100", lambda value: 0.009999 <= value <= 100),
    "presence_penalty": ("from -2 to 2", lambda value: -2 <= value <= 2),
    "frequency_penalty": ("from -2 to 2", lambda value: -2 <= value <= 2),
}
"""By parameter: the range in words, and whether a finite number is in it."""
