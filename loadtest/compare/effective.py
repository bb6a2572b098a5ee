"""The effective length of a deployment, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from loadtest.compare import analysis
from loadtest.compare.types import Comparison
from loadtest.measuring.types import Interval


@dataclass(frozen=True, slots=True)
class Effective:
    """The longest context up to which a deployment keeps the margin's share of full's score at its shortest.

    Attributes:
        length: tokens; 0 where even the shortest context fails.
        least: the longest that it is surely, at the plan's confidence for each length by itself.
        most: the longest that it may be: at the next context it surely keeps less, or nothing was measured.
    """

    length: int
    least: int
    most: int


def effective_length(comparison: Comparison, name: str) -> Effective | None:
    """The effective length of a deployment.

    RULER (Hsieh et al. 2024, section 4) holds the mean over its tasks against a fixed score; here full
    attention's at the shortest context is the measure, over the tasks that are informative there, each task
    weighing the same. Every shorter context has to pass too: one that passes by luck behind one that fails
    is not effective. Both scores are estimates: the interval of their difference is made of their own (Zou
    and Donner: Construction of confidence intervals about effect measures, 2008). At the shortest context
    both answered the same questions, and the interval is of what was lost, question by question.

    Args:
        comparison: with the rows.
        name: of the deployment, which may be full itself.

    Returns:
        ``None`` where no task is informative at the shortest context, or where it keeps the share up to a
        length at which a task has no answers yet.
    """
    contexts = sorted(comparison.plan.lengths(name))
    tasks = analysis.informative_tasks(comparison, contexts[0])
    if not tasks:
        return None
    measure = _mean([analysis.full_score(comparison, task, contexts[0]) for task in tasks])
    lengths: list[int] = []
    margins: list[Interval] = []
    for length in contexts:
        scores = [analysis.own_score(comparison, name, task, length) for task in tasks]
        if not all(score.count for score in scores):
            if all(margin.value >= 0 for margin in margins):
                return None
            break
        lengths.append(length)
        share = comparison.plan.margins.effective
        if length != contexts[0]:
            margins.append(_above(_mean(scores), measure, share))
        elif name == comparison.plan.full:
            # By definition, however few questions its score is an estimate from.
            margins.append(_exactly((1 - share) * measure.value, measure.count))
        else:
            losses = [
                analysis.points_lost(
                    analysis.task_pairs(comparison, name, (task,), length), comparison.plan.confidence
                )
                for task in tasks
            ]
            margins.append(_above_paired(_mean(losses), measure, share))
    return Effective(
        _longest(lengths, [margin.value >= 0 for margin in margins]),
        _longest(lengths, [margin.claimed and margin.low >= 0 for margin in margins]),
        _longest(lengths, [not (margin.claimed and margin.high < 0) for margin in margins]),
    )


def _longest(lengths: Sequence[int], passed: Sequence[bool]) -> int:
    """The last length before the first that did not pass; 0 for none."""
    kept = 0
    for length, one in zip(lengths, passed, strict=True):
        if not one:
            break
        kept = length
    return kept


def _mean(scores: Sequence[Interval]) -> Interval:
    """The mean of independent estimates."""
    value = fmean(score.value for score in scores)
    below = math.hypot(*(score.value - score.low for score in scores)) / len(scores)
    above = math.hypot(*(score.high - score.value for score in scores)) / len(scores)
    return Interval(value, value - below, value + above, min(score.count for score in scores))


def _above(own: Interval, full: Interval, share: float) -> Interval:
    """How much more ``own`` is than a share of ``full``, of other questions."""
    value = own.value - share * full.value
    below = math.hypot(own.value - own.low, share * (full.high - full.value))
    above = math.hypot(own.high - own.value, share * (full.value - full.low))
    return Interval(value, value - below, value + above, min(own.count, full.count))


def _above_paired(loss: Interval, full: Interval, share: float) -> Interval:
    """Like ``_above``, for the same questions: the loss may be all of ``full`` except the share."""
    spare = full.scaled(1 - share)
    value = spare.value - loss.value
    below = math.hypot(loss.high - loss.value, spare.value - spare.low)
    above = math.hypot(loss.value - loss.low, spare.high - spare.value)
    return Interval(value, value - below, value + above, min(loss.count, full.count))


def _exactly(value: float, count: int) -> Interval:
    return Interval(value, value, value, count)
