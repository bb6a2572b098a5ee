"""Student's t, by whole degrees of freedom: the distribution of means whose spread is estimated from them."""

from __future__ import annotations

import math
from functools import lru_cache


def student_tail(value: float, freedom: int) -> float:
    """Chance that Student's t exceeds ``value``, by the series for whole degrees of freedom.

    Abramowitz and Stegun: Handbook of Mathematical Functions, 1964, 26.7.3 and 26.7.4.
    """
    angle = math.atan2(value, math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = total = cosine if odd else 1.0
    for step in range(3 if odd else 2, freedom, 2):
        term *= cosine**2 * (step - 1) / step
        total += term
    if freedom == 1:
        total = 0.0
    within = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return max((1 - within) / 2, 0.0)


@lru_cache(maxsize=4096)
def student_quantile(chance: float, freedom: int) -> float:
    """The value that Student's t exceeds with this chance, below one half."""
    low, high = 0.0, 1.0
    while student_tail(high, freedom) > chance:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_tail(middle, freedom) > chance else (low, middle)
    return high
