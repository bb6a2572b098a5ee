"""When more samples would not change a verdict, nor more rounds what is said of speed."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

from loadtest.compare.equal import equal_work
from loadtest.compare.gains import deciding_figure
from loadtest.compare.types import Comparison, Evidence, Outcome, Verdict
from loadtest.measuring.analysis import series, settled
from loadtest.measuring.statistics import least
from loadtest.measuring.types import Load

FIRM = 0.7
"""By how many standard errors an interval is widened before measuring may stop on it.

A run that looks after each new sample and stops at the first certain look is wrong more often than the
confidence says: with a loss on the margin itself 13 of 100 simulated runs of 15 looks ended with a verdict,
with this widening 7. Pocock (Group sequential methods in the design and analysis of clinical trials, 1977)
widens all looks alike, for 20 of them at 95% from 1.96 to 2.67 standard errors.
"""


def widening(confidence: float) -> float:
    """By how much intervals of a confidence are widened: 1.36 times at 95%, more where they are narrower."""
    return 1 + FIRM / NormalDist().inv_cdf((1 + confidence) / 2)


def is_firm(test: Evidence, confidence: float = 0.95) -> bool:
    """The outcome would be the same with the interval widened; see ``FIRM``.

    Args:
        test: with its outcome.
        confidence: of its interval.
    """
    loss, by = test.loss, widening(confidence)
    if test.outcome is Outcome.SAFE:
        return loss.value + by * (loss.high - loss.value) <= test.margin
    if test.outcome is Outcome.UNSAFE:
        return loss.value - by * (loss.value - loss.low) > test.margin
    return False


def open_tests(verdict: Verdict, confidence: float = 0.95) -> frozenset[tuple[str, int]]:
    """Measure and length of the tests of a variant on which more samples should still be spent.

    A variant with one loss that is firmly beyond its margin needs none, nor has one whose deciding tests
    are all firmly within theirs, nor one whose open tests no samples would settle. Measures are those of
    ``Evidence``, single tasks among ``tasks``.

    Args:
        verdict: on the variant.
        confidence: of its intervals.
    """
    if any(test.outcome is Outcome.UNSAFE and is_firm(test, confidence) for test in verdict.evidence):
        return frozenset()
    return frozenset(
        ("tasks" if test.measure.startswith("task") else test.measure, test.length)
        for test in verdict.evidence
        if test.decides and not is_firm(test, confidence) and not _is_hopeless(test)
    )


def _is_hopeless(test: Evidence) -> bool:
    """No samples would settle it, since full attention itself has nothing to lose there."""
    return test.outcome is Outcome.UNKNOWN and test.more is None


def speeds_settled(comparison: Comparison, load: Load, alive: Sequence[str]) -> bool:
    """More rounds of a load would tell nothing that matters of any variant.

    Equal work can't be told apart, and need not; but it too takes as many rounds as an interval does, else
    full attention itself has no figures, and whether the machine is quiet is not known.

    Args:
        comparison: with the rows.
        load: of whose rounds the question is.
        alive: candidates that can be measured under it.
    """
    figure, plan = deciding_figure(load), comparison.plan
    full, confidence = plan.full, plan.confidence
    if len(series(comparison.speed, full, load.label, figure)) < least(confidence):
        return False
    others = [name for name in alive if name != full and not equal_work(comparison, name, load, figure)]
    return all(
        settled(comparison.speed, name, full, load.label, figure, plan.margins.speed, confidence)
        for name in others
    )
