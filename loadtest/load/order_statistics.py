"""How far a percentile of one run can be trusted: intervals from ranks, for any distribution.

Of ``count`` independent values, the number that lie below the true percentile is binomial. So ranks can be
named between which it lies with ``CONFIDENCE`` (David and Nagaraja: Order Statistics, 2003, section
7.1). Nothing here needs more than Python, since ``longspan load`` runs where only the client is installed.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from functools import lru_cache

CONFIDENCE = 0.95
"""At least this share of the intervals hold the true percentile."""


@lru_cache(maxsize=1024)
def ranks(count: int, share: float) -> tuple[int, int] | None:
    """The ranks, from 1, of the ordered values between which the true percentile lies.

    Tails are equal where there are enough values. With fewer, the upper end is the largest value, and the
    excess of its tail is taken from the lower one.

    Args:
        count: of values.
        share: of the percentile, 0.99 for the 99th; at least a half.

    Returns:
        ``None`` where there are too few values for any such ranks.
    """
    if count < 1:
        return None
    tail = (1 - CONFIDENCE) / 2
    upper = max(tail, share**count)  # all of them can lie below the true percentile
    # Probabilities that at most so many values lie below it, from 0.
    within = list(itertools.accumulate(_probability(count, share, below) for below in range(count + 1)))
    low = bisect.bisect_right(within, min(tail, 1 - CONFIDENCE - upper))
    return (low, min(count, bisect.bisect_left(within, 1 - upper - 1e-12) + 1)) if low else None


def interval(ordered: Sequence[float], share: float) -> list[float] | None:
    """The ends of the interval of a percentile, or ``None`` where the values cannot carry one.

    Args:
        ordered: independent values, ascending.
        share: of the percentile.
    """
    found = ranks(len(ordered), share)
    return None if found is None else [ordered[found[0] - 1], ordered[found[1] - 1]]


def needed(share: float) -> int:
    """The fewest values of which the largest is beyond the true percentile with ``CONFIDENCE``.

    With fewer, the sample's percentile is its largest value or near it, and nothing bounds the true one from
    above: 299 for the 99th, 29 for the 90th.
    """
    return math.ceil(math.log(1 - CONFIDENCE) / math.log(share))


def _probability(count: int, share: float, below: int) -> float:
    """Probability that exactly ``below`` values lie below the true percentile."""
    logarithm = (
        math.lgamma(count + 1)
        - math.lgamma(below + 1)
        - math.lgamma(count - below + 1)
        + below * math.log(share)
        + (count - below) * math.log1p(-share)
    )
    return math.exp(logarithm)
