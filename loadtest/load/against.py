"""A load test against an earlier one: what changed, and whether that can be told from noise."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

from loadtest.load.result import Result
from loadtest.load.rows import FIGURES, Cell, Figure, Row, rows
from loadtest.measuring.types import Interval


class Finding(enum.StrEnum):
    """The finding on a change."""

    BETTER = "better"
    WORSE = "worse"
    NONE = "no difference shown"
    UNTESTED = "not tested"


@dataclass(frozen=True, slots=True)
class Change:
    """One figure before and after.

    Attributes:
        label: of the row.
        figure: which, with name, unit and factor.
        before: in seconds or per second.
        after: likewise.
        ratio: after / before. Across repeats its interval is of the ratio of medians, resampled; within one
            run each it is what the two intervals allow at most.
        finding: better or worse only where the ratio's interval excludes 1.
        across_runs: intervals are of repeats. Else they are of requests within one run each, and what changes
            from run to run is not in them.
    """

    label: str
    figure: Figure
    before: Interval
    after: Interval
    ratio: Interval
    finding: Finding
    across_runs: bool


def changes(before: Result, after: Result) -> list[Change]:
    """Every figure of every row that both results have, in the order of ``after``."""
    earlier = {row.label: row for row in rows(before)}
    return [
        change(figure, earlier[row.label], row, min(before.confidence, after.confidence))
        for row in rows(after)
        if row.label in earlier
        for figure in FIGURES
    ]


def only_in_one(before: Result, after: Result) -> list[str]:
    """Labels of rows that only one result has, those of ``after`` first."""
    ours, theirs = (dict.fromkeys(run.label for run in result.runs) for result in (after, before))
    return [label for label in (*ours, *theirs) if label not in ours or label not in theirs]


def change(figure: Figure, before: Row, after: Row, confidence: float) -> Change:
    """One figure of two rows of the same label."""
    one, other = before.cells[figure.key], after.cells[figure.key]
    across = one.across_runs and other.across_runs
    ratio = _across(figure, before, after, confidence) if across else _within(one, other)
    if not ratio.claimed:
        finding = Finding.UNTESTED
    elif not ratio.excludes(1.0):
        finding = Finding.NONE
    else:
        finding = Finding.BETTER if (ratio.value > 1) == figure.more_is_better else Finding.WORSE
    return Change(before.label, figure, one.interval, other.interval, ratio, finding, across)


def _across(figure: Figure, before: Row, after: Row, confidence: float) -> Interval:
    from loadtest.measuring.statistics import ratio_interval  # numpy, which single runs do not need

    values = [
        [value for run in row.runs if not math.isnan(value := figure.get(run.summary))]
        for row in (after, before)
    ]
    return ratio_interval(values[0], values[1], confidence)


def _within(one: Cell, other: Cell) -> Interval:
    before, after = one.interval, other.interval
    if not before.value or math.isnan(before.value) or math.isnan(after.value):
        return Interval()
    value = after.value / before.value
    whole = before.claimed and after.claimed and before.low > 0 and not (one.across_runs or other.across_runs)
    if not whole:
        return Interval(value, count=1)
    return Interval(value, after.low / before.high, after.high / before.low, count=1)
