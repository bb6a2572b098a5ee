"""Full attention's own ability on this model: only where it succeeds can a variant lose something."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import fmean

from loadtest.compare import analysis
from loadtest.compare.equal import sees_all
from loadtest.compare.types import EXACT, Comparison
from loadtest.evaluation.pairs import OWN
from loadtest.measuring.types import length_label

_EULER = 0.5772156649


@dataclass(frozen=True, slots=True)
class Ground:
    """Where differences can show.

    Attributes:
        informative: by length, tasks that full attention can do.
        failed: by length, tasks that were asked and that it can't do.
        open: by length, tasks with too few questions so far to tell which.
        guessed: lengths at which it predicts the text no better than from how frequent tokens are.
        unread: lengths at which it has decoded no text yet.
        own: it answers enough of the user's own questions; ``None`` where no answer is known.
        remarks: the tasks and lengths that tell nothing, in words.
    """

    informative: dict[int, tuple[str, ...]]
    failed: dict[int, tuple[str, ...]]
    open: dict[int, tuple[str, ...]]
    guessed: frozenset[int]
    unread: frozenset[int]
    own: bool | None
    remarks: tuple[str, ...]

    def tells(self, length: int) -> bool:
        """At a length there is something to lose, as far as is known."""
        return length not in self.guessed or bool(self.informative[length] or self.open[length])

    @property
    def none(self) -> bool:
        """None of the measurements can tell a good variant from a bad one."""
        measured = set(self.informative) - self.unread
        return not self.own and bool(measured) and not any(self.tells(length) for length in measured)


def survey(comparison: Comparison) -> Ground:
    """Looks at what full attention did in a comparison."""
    full, contexts = comparison.plan.full, comparison.plan.contexts
    informative: dict[int, tuple[str, ...]] = {}
    failed, unsettled = dict(informative), dict(informative)
    guessed, unread = set(), set()
    remarks = []
    for length in contexts:
        perplexity = analysis.perplexity(comparison, full, length)
        if math.isnan(perplexity):
            unread.add(length)
        elif perplexity >= frequency_perplexity(int(comparison.model.get("vocabulary_size", 0))):
            guessed.add(length)
            remarks.append(
                f"text at {length_label(length)}: perplexity {perplexity:,.0f} under full attention, as bad "
                "as a guess from how frequent tokens are"
            )
        rows = [row for row in comparison.answers if (row.deployment, row.length) == (full, length)]
        here = replace(comparison, answers=rows)  # fewer rows to look through, once per task
        asked = analysis.tasks_at(here, length)
        scores = {task: analysis.full_score(here, task, length) for task in asked}
        informative[length] = tuple(one for one in asked if analysis.is_informative(here, one, length))
        failed[length] = tuple(
            task for task, score in scores.items() if score.claimed and score.value < analysis.INFORMATIVE
        )
        known = {*informative[length], *failed[length]}
        unsettled[length] = tuple(task for task in asked if task not in known)
        remarks += [_failed(here, task, length) for task in failed[length]]
        if (asked or length not in unread) and _all_see(comparison, length):
            remarks.append(
                f"all at {length_label(length)}: every variant sees the whole context, as full attention "
                "does, so that nothing there can tell them apart"
            )
    answers = [
        row.score
        for row in comparison.answers
        if (row.deployment, row.task) == (full, OWN) and not (row.error or math.isnan(row.score))
    ]
    own = fmean(answers) >= analysis.INFORMATIVE if answers else None
    if own is False:
        remarks.append(
            f"your own questions: full attention itself scores {fmean(answers):.2f} "
            f"in {len(answers)} question{'s' * (len(answers) > 1)}"
        )
    return Ground(informative, failed, unsettled, frozenset(guessed), frozenset(unread), own, tuple(remarks))


def _all_see(comparison: Comparison, length: int) -> bool:
    return all(
        one.attention in EXACT or sees_all(comparison, one.name, length)
        for one in comparison.plan.candidates[1:]
    )


def frequency_perplexity(vocabulary: int) -> float:
    """Perplexity of a model that knows how frequent tokens are, and nothing else.

    By Zipf's law the r-th most frequent of ``V`` tokens has probability ``1 / (r H)`` with ``H = ln V +
    0.577``; the entropy is then ``ln(V)^2 / (2 H) + ln H`` nats. For 49,152 tokens it is the exponential of
    7.6, for 256 bytes of 4.3.

    Args:
        vocabulary: its size in tokens; infinity is returned where it is not known (0).
    """
    if vocabulary < 2:
        return math.inf
    log = math.log(vocabulary)
    harmonic = log + _EULER
    return math.exp(log**2 / (2 * harmonic) + math.log(harmonic))


def _failed(comparison: Comparison, task: str, length: int) -> str:
    score = analysis.full_score(comparison, task, length)
    return (
        f"{task} at {length_label(length)}: full attention itself scores {score.value:.2f} "
        f"({max(score.low, 0):.2f} to {min(score.high, 1):.2f}) in {score.count} questions"
    )
