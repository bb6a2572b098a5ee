"""Intervals: how far a figure of few samples can be trusted.

Everything is deterministic: resampling draws from a fixed seed, so that a document gives the same verdict
each time that it is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from statistics import NormalDist, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtest.measuring.skew import reach
from loadtest.measuring.student import student_quantile
from loadtest.measuring.types import Interval

LEAST = 6
"""Samples below which no interval is claimed: the whole range of five misses the median 1 time in 16."""

_RESAMPLES = 4000
_SEED = 20240613

_Floats = NDArray[np.floating[Any]]


def least(confidence: float) -> int:
    """Samples below which not even their whole range holds the median so surely; at least ``LEAST``.

    All of n samples lie on one side of it 1 time in 2^(n-1).
    """
    return max(LEAST, math.ceil(1 - math.log2(1 - confidence)))


def median_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The median of independent values, and its bootstrap interval.

    The interval is the expanded percentile interval (Hesterberg: What Teachers Should Know About the
    Bootstrap, 2015, section 4.2.2), since plain percentiles are too narrow where samples are few.
    """
    if len(values) < least(confidence):
        return Interval(median(values) if values else math.nan, count=len(values))
    ordered = np.sort(np.asarray(values, float))
    below, above = _middles(len(values))
    medians = (ordered[below] + ordered[above]) / 2
    return Interval(median(values), *_percentiles(medians, len(values), confidence), len(values))


def ratio_interval(
    numerators: Sequence[float], denominators: Sequence[float], confidence: float = 0.95
) -> Interval:
    """The ratio of the medians of two unpaired samples of positive values, and its bootstrap interval.

    See ``median_interval``; both are drawn anew each time, and the smaller one sets how much the interval is
    expanded. ``count`` is the smaller one's.
    """
    count = min(len(numerators), len(denominators))
    if not count or not median(denominators):
        return Interval(count=count)
    value = median(numerators) / median(denominators)
    if count < least(confidence) or min(*numerators, *denominators) <= 0:
        return Interval(value, count=count)
    draws = np.random.default_rng(_SEED)
    above, below = (
        np.median(
            np.asarray(values, float)[draws.integers(0, len(values), (_RESAMPLES, len(values)))], axis=1
        )
        for values in (numerators, denominators)
    )
    return Interval(value, *_percentiles(above / below, count, confidence), count)


def mean_interval(
    values: Sequence[float],
    confidence: float = 0.95,
    clusters: Sequence[object] | None = None,
    fewest: int = LEAST,
) -> Interval:
    """The mean, and its interval by Student's t, farther on a side where samples are skewed.

    See ``skew.reach``. Dependent values count as one sample, so that the freedom of t is that of the clusters
    (Cameron and Miller: A practitioner's guide to cluster-robust inference, 2015, section VI).
    At 95% it missed the mean of 6 to 30 slices of 8 blocks 1 to 6 times in 100 on one side, of log-normal
    losses or losses in 1 block of 20; no method can see a loss that none of the samples has.

    Args:
        values: to be averaged, each weighing the same.
        confidence: of the interval.
        clusters: one label per value; values of one label depend on one another. Without it each value is
            one of its own.
        fewest: clusters below which no interval is claimed; at least 2.
    """
    if not values:
        return Interval()
    sums, counts = _by_cluster(np.asarray(values, float), clusters)
    mean, groups = float(sums.sum() / counts.sum()), len(sums)
    if groups < max(fewest, 2):
        return Interval(mean, count=groups)
    deviations = sums - counts * mean
    variance = groups / (groups - 1) * float((deviations**2).sum()) / float(counts.sum()) ** 2
    below, above = reach(deviations, student_quantile((1 - confidence) / 2, groups - 1))
    error = math.sqrt(variance)
    return Interval(mean, mean - below * error, mean + above * error, groups)


def score_loss(
    full: Sequence[float],
    own: Sequence[float],
    confidence: float = 0.95,
    clusters: Sequence[object] | None = None,
) -> Interval:
    """How many points of 1 ``own`` loses against ``full``, paired, and its interval.

    Agresti and Min (Simple improved confidence intervals for comparing matched proportions, 2005): two
    samples are imagined beside the real ones, one half lost and one half won of each, so that no loss in
    ten samples does not pass for certainty. For scores between 0 and 1 the same with their squares.

    The upper end is at least that of a score interval (Tango: Equivalence test and confidence interval for
    the difference in proportions for the paired-sample design, 1998): the variance there is the one that
    samples would have whose mean loss is that end. Else losses that are rare pass for none: 38 samples
    without any put the end below 0.05, and one loss in 20 goes unseen in 38 samples 1 time in 7.

    Samples that share a context may depend on one another. Where their sums by context vary more than
    independent samples would, that variance counts; and since few contexts tell little of how they vary,
    Student's t by their number counts in any case (Cameron and Miller: A practitioner's guide to
    cluster-robust inference, 2015, section VI), farther on a side where contexts are skewed (``skew.reach``).
    From several samples of a single context this can't be told, and no interval is claimed.

    Args:
        full: scores of full attention, 0 to 1.
        own: of the variant, of the same samples.
        confidence: of the interval.
        clusters: one label per sample; those of one label share a context.
    """
    if not full:
        return Interval()
    losses = np.asarray(full, float) - np.asarray(own, float)
    count = len(losses)
    sums, counts = _by_cluster(losses, clusters)
    mean = float(losses.sum() / (count + 2))
    # Two imagined samples that differ by 1/2 of a loss and 1/2 of a win each add 1 to the sum of squares.
    squares = float(((losses - mean) ** 2).sum()) + 1.0
    groups = len(sums)
    if groups == 1 < count:
        return Interval(float(losses.mean()), count=count)
    quantile, design = _quantile((1 + confidence) / 2), 1.0
    below = above = quantile
    if groups < count:
        deviations = sums - counts * float(losses.mean())
        together = groups / (groups - 1) * float((deviations**2).sum()) + 1.0
        quantile, design = student_quantile((1 - confidence) / 2, groups - 1), max(1.0, together / squares)
        spread = math.sqrt(design * squares * (groups - 1)) / groups
        below, above = reach(deviations, quantile, spread)
    error = math.sqrt(design * squares) / (count + 2)
    # With two contexts that differ the interval would leave what scores can lose.
    high = min(1.0, max(mean + above * error, _most_lost(losses, quantile * math.sqrt(design / count))))
    return Interval(float(losses.mean()), max(-1.0, mean - below * error), high, count)


def _most_lost(losses: _Floats, errors: float) -> float:
    """The mean loss from which the one that was found lies so many errors of one sample away.

    The loss beyond the found mean comes from samples that had lost nothing and now lose everything.
    """
    mean, spread = float(losses.mean()), float(losses.var())
    low, high = mean, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        variance = spread + (middle - mean) - (middle**2 - mean**2)
        low, high = (
            (low, middle) if middle - mean > errors * math.sqrt(max(variance, 0.0)) else (middle, high)
        )
    return high


def to_settle(loss: Interval, margin: float, confidence: float = 0.95) -> int | None:
    """Samples beyond ``loss.count`` with which its interval would probably lie on one side of ``margin``.

    An interval narrows with the square root of the samples. ``None`` where the interval lies on one side
    already; where none is claimed yet, as many as a claim takes.
    """
    if not loss.claimed:
        return max(1, least(confidence) - loss.count)
    if not loss.low <= margin <= loss.high:
        return None
    half = loss.high - loss.value if loss.value < margin else loss.value - loss.low
    distance = max(abs(margin - loss.value), 0.1 * half)  # on the margin no number is enough
    return max(1, math.ceil(loss.count * ((half / distance) ** 2 - 1)))


def score_to_settle(loss: Interval, margin: float, confidence: float = 0.95) -> int | None:
    """As ``to_settle``, of an interval by ``score_loss``.

    Where losses are rare its upper end comes down faster than with the square root of the samples, since
    with it comes down the variance that it is made with.
    """
    plain = to_settle(loss, margin, confidence)
    if plain is None or not loss.claimed or loss.value >= margin or loss.high >= 1:
        return plain
    count, mean, high = loss.count, loss.value, loss.high

    def added(end: float) -> float:
        return (end - mean) - (end**2 - mean**2)

    # Both ends are made with the same quantile and the same spread; of these the spread is needed.
    shares = (mean * count / (count + 2) - loss.low) ** 2 * (count + 2) ** 2 / ((high - mean) ** 2 * count)
    spread = (1 - shares * added(high)) / (shares - count) if shares != count else 1.0
    spread = min(max(spread, 0.0), 1.0)
    distance = max(margin - mean, 0.1 * (high - mean))
    narrower = ((high - mean) / distance) ** 2 * (spread + added(margin)) / (spread + added(high))
    return max(1, math.ceil(count * (narrower - 1)))


def _by_cluster(values: _Floats, clusters: Sequence[object] | None) -> tuple[_Floats, _Floats]:
    """Sum and count of each cluster."""
    if clusters is None:
        return values, np.ones(len(values))
    order = {label: number for number, label in enumerate(dict.fromkeys(clusters))}
    numbers = np.asarray([order[label] for label in clusters])
    counts = np.bincount(numbers, minlength=len(order)).astype(float)
    return np.bincount(numbers, weights=values, minlength=len(order)).astype(float), counts


def _drawn(count: int) -> NDArray[np.int64]:
    return np.random.default_rng(_SEED).integers(0, count, (_RESAMPLES, count))


@lru_cache(maxsize=128)
def _middles(count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places, among so many values in order, of the two middle ones of each resample; one place if it is odd.

    They depend on no value, and finding them is nearly all of an interval's work, of which a comparison's
    judgment has dozens after each round.
    """
    drawn = np.sort(_drawn(count), axis=1)
    return drawn[:, (count - 1) // 2].copy(), drawn[:, count // 2].copy()


def _percentiles(resampled: _Floats, count: int, confidence: float) -> tuple[float, float]:
    """The ends of the expanded percentile interval."""
    tail = (1 - confidence) / 2
    expanded = math.sqrt(count / (count - 1)) * student_quantile(tail, count - 1)
    share = 1 - NormalDist().cdf(expanded)
    low, high = np.quantile(resampled, [share, 1 - share])
    return float(low), float(high)


_quantile: Callable[[float], float] = NormalDist().inv_cdf
