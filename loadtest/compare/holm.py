"""P-values of losses beyond their margins, for one test and for many at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

from loadtest.compare.types import Evidence
from loadtest.measuring.student import student_quantile, student_tail
from loadtest.measuring.types import Interval


def p_worse(evidence: Evidence, confidence: float) -> float:
    """P-value: chance of a loss at least as large if the true loss is the margin; 1 without an interval.

    It is the level at which the lower end of the interval would reach the margin, if intervals widen with
    Student's t by the number of contexts. Those of scores widen less where contexts don't matter (see
    ``loadtest.measuring.statistics``), so that for them it is an upper bound.

    Args:
        evidence: with its interval.
        confidence: of that interval, two-sided.
    """
    loss, margin = _on_scale(evidence)
    if not loss.claimed or loss.value <= margin:
        return 1.0
    if loss.low >= loss.value:
        return 0.0  # no two samples differ
    reached = (loss.value - margin) / (loss.value - loss.low)
    freedom = freedom_of(evidence)
    return student_tail(student_quantile((1 - confidence) / 2, freedom) * reached, freedom)


def holm(chances: Sequence[float], level: float) -> list[bool]:
    """Which hypotheses are rejected, so that the chance of rejecting any true one is at most ``level``.

    Holm: A simple sequentially rejective multiple test procedure, 1979.

    Args:
        chances: p-values, dependent or not.
        level: of the whole family.
    """
    rejected = [False] * len(chances)
    for done, number in enumerate(sorted(range(len(chances)), key=chances.__getitem__)):
        if chances[number] > level / (len(chances) - done):
            break
        rejected[number] = True
    return rejected


def with_many(evidence: Evidence, confidence: float, tests: int = 1) -> Interval:
    """The interval as narrow as so many samples would make it if Student's t had all freedom.

    That of few contexts is wide since they are few, and narrows faster than samples grow.

    Args:
        evidence: with its interval.
        confidence: of that interval.
        tests: among which it is one; its lower end is then that of Bonferroni, Holm's first step.
    """
    loss, tail, normal = evidence.loss, (1 - confidence) / 2, NormalDist()
    independent = evidence.unit in ("score", "agreement") and contexts_of(evidence) == loss.count
    plain = normal.inv_cdf(1 - tail)
    ours = plain if independent else student_quantile(tail, freedom_of(evidence))
    below, above = normal.inv_cdf(1 - tail / max(tests, 1)) / ours, plain / ours
    return Interval(
        loss.value,
        loss.value - below * (loss.value - loss.low),
        loss.value + above * (loss.high - loss.value),
        loss.count,
    )


def _on_scale(evidence: Evidence) -> tuple[Interval, float]:
    """Loss and margin where estimates are symmetric: a ratio of perplexities as its logarithm."""
    loss, margin = evidence.loss, evidence.margin
    if evidence.unit != "perplexity":
        return loss, margin
    value, low, high = (math.log1p(end) for end in (loss.value, loss.low, loss.high))
    return Interval(value, low, high, loss.count), math.log1p(margin)


def contexts_of(evidence: Evidence) -> int:
    """Contexts that a loss comes from; each sample is one of its own where that is not said."""
    return evidence.contexts or evidence.loss.count


def freedom_of(evidence: Evidence) -> int:
    """Degrees of freedom of Student's t for a loss."""
    return max(contexts_of(evidence) - 1, 1)
