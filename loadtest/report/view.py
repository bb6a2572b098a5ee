"""Views of a judgment that several parts of a comparison's report share."""

from __future__ import annotations

import math
from collections.abc import Iterable

from loadtest.compare.gains import deciding_figure, new_prompts, of_memory, operators_load, under_load
from loadtest.compare.types import Comparison, Evidence, Gain, Outcome, Verdict
from loadtest.measuring.types import Interval

BADGES = {
    Outcome.SAFE: ("safe", "✓"),
    Outcome.UNSAFE: ("unsafe", "✕"),
    Outcome.UNKNOWN: ("unknown", "?"),
}
"""Class and sign of each outcome."""

MEASURES = ("text", "tasks", "own")
"""Tests that a variant is summed up by."""


def badge(outcome: Outcome) -> dict[str, str]:
    """An outcome's class, sign and words."""
    kind, sign = BADGES[outcome]
    return {"kind": kind, "sign": sign, "words": str(outcome)}


def numbers(comparison: Comparison) -> dict[str, int]:
    """Each candidate's place in the plan, which gives it its look."""
    return {candidate.name: number for number, candidate in enumerate(comparison.plan.candidates)}


def gain(verdict: Verdict, comparison: Comparison, context: int, figure: str) -> Gain | None:
    """A variant's gain at a context: under the operator's load, to the first token for new prompts."""
    if figure in ("bytes", "fits"):
        return of_memory(verdict.gains, context, figure)
    load = new_prompts(comparison, context) if figure == "ttft" else operators_load(comparison, context)
    return under_load(verdict.gains, load, figure)


def speed(verdict: Verdict, comparison: Comparison, context: int) -> Gain | None:
    """The gain that the operator's load is judged by."""
    load = operators_load(comparison, context)
    return None if load is None else gain(verdict, comparison, context, deciding_figure(load))


def used(evidence: Evidence) -> Interval:
    """The loss as shares of what is allowed."""
    return evidence.loss.scaled(1 / evidence.margin if evidence.margin > 0 else math.nan)


def worst(verdict: Verdict, context: int) -> Evidence | None:
    """The deciding test at a context that may have used most of its margin."""

    def most(evidence: Evidence) -> float:
        loss = used(evidence)
        return loss.high if loss.claimed else loss.value

    found = [
        evidence
        for evidence in verdict.evidence
        if evidence.decides and evidence.length in (context, 0) and math.isfinite(most(evidence))
    ]
    return max(found, key=most, default=None)


def distinct(evidence: Iterable[Evidence]) -> list[Evidence]:
    """All tests but those of a task that is the only one of its length: they repeat that of all tasks."""
    kept = list(evidence)
    together = {(one.length, one.unit, one.loss) for one in kept if one.measure == "tasks"}
    return [
        one
        for one in kept
        if not (one.measure.startswith("task:") and (one.length, one.unit, one.loss) in together)
    ]


def first(evidence: Iterable[Evidence], measure: str, context: int) -> Evidence | None:
    """The test of a measure at a context, or of all contexts together."""
    return next((one for one in evidence if one.measure == measure and one.length in (context, 0)), None)
