"""When more samples would not change a verdict, and more rounds not the finding on speed."""

from __future__ import annotations

from collections.abc import Sequence

from loadtest.compare.equal import equal_work
from loadtest.compare.gains import deciding_figure, operators_load
from loadtest.compare.holm import freedom_of
from loadtest.compare.types import Comparison, Evidence, Outcome, Verdict
from loadtest.measuring.analysis import series, settled
from loadtest.measuring.statistics import least
from loadtest.measuring.student import student_quantile
from loadtest.measuring.types import Load

STRICTER = 50
"""How many times rarer an error has to be for a run to stop on an outcome than for a verdict.

A run that looks after each new sample and stops at the first certain look is wrong more often than the
confidence says. Looks that may end it early therefore have a far stricter level, 0.001 where the
verdict's is 0.05, which leaves the last look about as it is (Haybittle: Repeated assessment of results in
clinical trials of cancer treatment, 1971; Peto et al.: Design and analysis of randomized clinical trials,
1976). With a loss on the margin itself and a look after each of the samples 6 to 120, simulated runs ended
with a verdict at most 1.4 times as often as one look at the end would have, for confidences from 0.5 to
0.999; 5.8 of 100 at 95%.
"""

LEAST_CONFIDENCE = 0.5
"""Least confidence: below it an outcome is a guess, and there is nothing to stop for."""

MOST_CONFIDENCE = 0.999
"""Largest confidence: beyond it errors are too rare to be counted in simulated runs."""


def widening(confidence: float, freedom: int) -> float:
    """How many times as wide an interval is at the level of ``STRICTER``: 1.7 at 95% and many samples.

    Args:
        confidence: of the interval.
        freedom: of its Student's t.
    """
    tail = (1 - confidence) / 2
    return student_quantile(tail / STRICTER, freedom) / student_quantile(tail, freedom)


def is_firm(test: Evidence, confidence: float = 0.95) -> bool:
    """The outcome would be the same at the level of ``STRICTER``.

    Args:
        test: with its outcome.
        confidence: of its interval.
    """
    loss, by = test.loss, widening(confidence, freedom_of(test))
    if test.outcome is Outcome.SAFE:
        return loss.value + by * (loss.high - loss.value) <= test.margin
    if test.outcome is Outcome.UNSAFE:
        return loss.value - by * (loss.value - loss.low) > test.margin
    return False


def open_tests(verdict: Verdict, confidence: float = 0.95) -> frozenset[tuple[str, int]]:
    """Measure and length of the tests of a variant on which more samples should still be spent.

    There are none for a variant with a loss firmly beyond its margin, for one whose deciding tests are all
    firmly within theirs, and for one whose open tests no samples would settle. Measures are those of
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
    """More rounds of a load would not change the finding on any variant.

    Equal work can't be told apart, and need not; but it too takes as many rounds as an interval does, else
    it has no figures, nor has full attention, and whether the machine is quiet is not known.

    Args:
        comparison: with the rows.
        load: of whose rounds the question is.
        alive: candidates that can be measured under it.
    """
    figure, plan = _claimed(comparison, load), comparison.plan
    full, confidence = plan.full, plan.confidence
    # Each by itself, since full attention may have rounds from before that others have no part in.
    counts = [len(series(comparison.speed, name, load.label, figure)) for name in {full, *alive}]
    if min(counts) < least(confidence):
        return False
    others = [name for name in alive if name != full and not equal_work(comparison, name, load, figure)]
    return all(
        settled(comparison.speed, name, full, load.label, figure, plan.margins.speed, confidence)
        for name in others
    )


def _claimed(comparison: Comparison, load: Load) -> str:
    """The figure that a load's rounds are for: TTFT where one user's decoding has a load of its own.

    Time per token is told by the prompts in the prefix cache then, and new ones are only there for the time
    to the first.
    """
    single_user = load.concurrency == 1 and not load.rate
    if single_user and not load.cached and load != operators_load(comparison, load.context):
        return "ttft"
    return deciding_figure(load)
