"""Student's t for means of skewed samples: rare large values move the farther end of an interval."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray


def reach(
    deviations: NDArray[np.floating[Any]], quantile: float, spread: float | None = None
) -> tuple[float, float]:
    """How many standard errors a mean's interval reaches below it and above it.

    Hall: On the removal of skewness by transformation of a confidence interval, 1992, section 2: t is
    transformed so that its skewness goes, and the ends are transformed back. Each end is the farther one of
    this and of Student's, since the skewness of few samples is mostly less than the true one.

    Args:
        deviations: of the samples, or of sums over what depends on one another, from their mean.
        quantile: of Student's t, that the interval would reach on both sides without skewness.
        spread: standard deviation that the error is made with, if that is not theirs.
    """
    count = len(deviations)
    if spread is None:
        spread = math.sqrt(float((deviations**2).mean()))
    # The rounding errors of equal values are no spread.
    skewness = float(((deviations / spread) ** 3).mean()) if spread > 1e-300 else 0.0
    if abs(skewness) < 1e-6:
        return quantile, quantile

    def back(t: float) -> float:
        inside = 1 + skewness * (t / math.sqrt(count) - skewness / (6 * count))
        return math.sqrt(count) * 3 / skewness * (math.copysign(abs(inside) ** (1 / 3), inside) - 1)

    return max(quantile, back(quantile)), max(quantile, -back(-quantile))
