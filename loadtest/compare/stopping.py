"""When more samples would not change a verdict."""

from __future__ import annotations

from loadtest.compare.types import Evidence, Outcome, Verdict

FIRM = 1.36
"""By how much an interval is widened before measuring may stop on it.

Who looks after each new sample and stops at the first certain look is wrong more often than the confidence
says: with a loss on the margin itself 13 of 100 simulated runs of 15 looks ended with a verdict, with this
factor 7. Pocock (Group sequential methods in the design and analysis of clinical trials, 1977) widens all
looks alike, for 20 of them at 95% from 1.96 to 2.67 standard errors.
"""


def is_firm(test: Evidence) -> bool:
    """The outcome would be the same with the interval widened by ``FIRM``."""
    loss = test.loss
    if test.outcome is Outcome.SAFE:
        return loss.value + FIRM * (loss.high - loss.value) <= test.margin
    if test.outcome is Outcome.UNSAFE:
        return loss.value - FIRM * (loss.value - loss.low) > test.margin
    return False


def open_tests(verdict: Verdict) -> frozenset[tuple[str, int]]:
    """Measure and length of the tests of a variant on which more samples should still be spent.

    A variant with one loss that is firmly beyond its margin needs none, nor has one whose deciding tests
    are all firmly within theirs, nor one whose open tests no samples would settle. Measures are those of
    ``Evidence``, single tasks among ``tasks``.
    """
    if any(test.outcome is Outcome.UNSAFE and is_firm(test) for test in verdict.evidence):
        return frozenset()
    return frozenset(
        ("tasks" if test.measure.startswith("task") else test.measure, test.length)
        for test in verdict.evidence
        if test.decides and not is_firm(test) and not _is_hopeless(test)
    )


def _is_hopeless(test: Evidence) -> bool:
    """No samples would settle it, since full attention itself has nothing to lose there."""
    return test.outcome is Outcome.UNKNOWN and test.more is None
