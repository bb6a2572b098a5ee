"""Whether later questions about a context lose more than the first: keys that they need were evicted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from loadtest.evaluation.pairs import AnswerPair
from loadtest.measuring.statistics import mean_interval
from loadtest.measuring.types import Interval


@dataclass(frozen=True, slots=True)
class Turns:
    """Scores of the first question about each context, and of those after it.

    Attributes:
        first: first questions, one for each context that has others.
        first_full: sum of full attention's scores of them: how many it found.
        first_own: of the variant's.
        later: questions after the first.
        later_full: sum of full attention's scores of them.
        later_own: of the variant's.
        difference: how many points of 1 more a later question loses than the first, by context.
    """

    first: int
    first_full: float
    first_own: float
    later: int
    later_full: float
    later_own: float
    difference: Interval

    @property
    def fails_later(self) -> bool:
        """Later questions surely lose more than first ones: zero and less lie outside the interval."""
        return self.difference.claimed and self.difference.low > 0


def by_turn(pairs: Sequence[AnswerPair], confidence: float) -> Turns | None:
    """Scores by whether a question is the first about its context; ``None`` where none has others after it.

    A context is its own measure: what its later questions lose on average, less what its first one loses.

    Args:
        pairs: questions that full attention and the variant both answered.
        confidence: of the interval.
    """
    contexts: dict[tuple[str, int, int], list[AnswerPair]] = {}
    for pair in pairs:
        contexts.setdefault(pair.context, []).append(pair)
    first, later, differences = [], [], []
    for asked in contexts.values():
        begin = [pair for pair in asked if pair.full.turn == 0]
        after = [pair for pair in asked if pair.full.turn > 0]
        if begin and after:
            first += begin
            later += after
            differences.append(fmean(map(_lost, after)) - fmean(map(_lost, begin)))
    if not differences:
        return None
    return Turns(
        len(first),
        math.fsum(pair.full.score for pair in first),
        math.fsum(pair.own.score for pair in first),
        len(later),
        math.fsum(pair.full.score for pair in later),
        math.fsum(pair.own.score for pair in later),
        mean_interval(differences, confidence),
    )


def _lost(pair: AnswerPair) -> float:
    return pair.full.score - pair.own.score
