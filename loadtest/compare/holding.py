"""Checks a comparison against known figures of the default model."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from loadtest.compare import analysis
from loadtest.compare.known import EXPECTED, MANY, SINGLE, Expectation, Figure
from loadtest.compare.types import Comparison
from loadtest.evaluation.types import Answer
from loadtest.measuring.analysis import series
from loadtest.measuring.statistics import ratio_interval
from loadtest.measuring.types import Interval, length_label


class Held(enum.StrEnum):
    """The outcome of an expectation."""

    YES = "as known"
    NO = "FAIL"
    UNTOLD = "not told"


_STYLES = {Held.YES: "green", Held.NO: "bold red", Held.UNTOLD: "yellow"}


@dataclass(frozen=True, slots=True)
class Finding:
    """An expectation and what was measured.

    Attributes:
        expectation: what was expected.
        measured: the figure; NaN where there is none.
        held: whether it lies within the bounds.
        note: why there is no figure, or why it does not count; empty for nothing.
    """

    expectation: Expectation
    measured: Interval
    held: Held
    note: str = ""


def hold(comparison: Comparison, expectations: Sequence[Expectation] = EXPECTED) -> list[Finding]:
    """Checks a comparison against known figures.

    Quality and memory come out alike each time on one machine, so their values count. Times don't: they fail
    only where the whole interval lies beyond a bound, and tell nothing where the machine is too busy.

    Args:
        comparison: with the rows.
        expectations: what is known.
    """
    return [_hold(comparison, each) for each in expectations]


def has_failed(findings: Sequence[Finding]) -> bool:
    """A figure is beyond its bound, or one of quality or memory is missing."""
    return any(finding.held is Held.NO for finding in findings)


def _hold(comparison: Comparison, expectation: Expectation) -> Finding:
    if expectation.deployment not in {one.name for one in comparison.plan.candidates}:
        return Finding(expectation, Interval(), Held.NO, "it is not a candidate of this comparison")
    measured = _MEASURES[expectation.figure][0](comparison, expectation)
    if expectation.figure is Figure.TPOT:
        return _hold_time(comparison, expectation, measured)
    if math.isnan(measured.value):
        reason = comparison.failed.get(expectation.deployment)
        errors = analysis.errors(comparison, expectation.deployment)
        note = reason or (errors[0] if errors else "the time did not suffice; give more --budget")
        return Finding(expectation, measured, Held.NO, note)
    inside = expectation.least <= measured.value <= expectation.most
    return Finding(expectation, measured, Held.YES if inside else Held.NO)


def _hold_time(comparison: Comparison, expectation: Expectation, measured: Interval) -> Finding:
    if comparison.busy:
        return Finding(expectation, measured, Held.UNTOLD, "the machine is too busy")
    if not measured.claimed:
        return Finding(expectation, measured, Held.UNTOLD, "too few rounds; give more --budget")
    inside = measured.low <= expectation.most and measured.high >= expectation.least
    return Finding(expectation, measured, Held.YES if inside else Held.NO)


def _perplexity(comparison: Comparison, expectation: Expectation) -> Interval:
    loss = analysis.text_loss(comparison, expectation.deployment, expectation.length)
    # Of fewer blocks than an interval takes, the value depends on which ones they are.
    return Interval(1 + loss.value, 1 + loss.low, 1 + loss.high, loss.count) if loss.claimed else Interval()


def _found(comparison: Comparison, expectation: Expectation) -> Interval:
    place = (expectation.deployment, expectation.length, expectation.task)
    scores = [
        row.score
        for row in _within(comparison.answers, expectation)
        if (row.deployment, row.length, row.task) == place and not row.error
    ]
    return Interval(math.fsum(scores) / len(scores), count=len(scores)) if scores else Interval()


def _logprob(comparison: Comparison, expectation: Expectation) -> Interval:
    rows = [row for row in _within(comparison.answers, expectation) if row.task == MANY]
    part = replace(comparison, answers=rows)
    pairs = analysis.task_pairs(part, expectation.deployment, (MANY,), expectation.length)
    return analysis.nats_lost(pairs, comparison.plan.confidence)


def _within(answers: Sequence[Answer], expectation: Expectation) -> list[Answer]:
    """Questions whose needle stands at a depth that counts."""
    first, last = expectation.depths
    return [row for row in answers if row.depth is not None and first <= row.depth <= last]


def _memory(comparison: Comparison, expectation: Expectation) -> Interval:
    held = {
        row.length: row.bytes
        for row in comparison.memory
        if row.deployment == expectation.deployment and not row.error
    }
    if not {expectation.shorter, expectation.length} <= held.keys():
        return Interval()
    return Interval(held[expectation.length] / held[expectation.shorter], count=1)


def _tpot(comparison: Comparison, expectation: Expectation) -> Interval:
    loads = {load.context: load.label for load in comparison.plan.loads if load.cached}
    long, short = (
        list(series(comparison.speed, expectation.deployment, loads.get(context, ""), "tpot").values())
        for context in (expectation.length, expectation.shorter)
    )
    return ratio_interval(long, short, comparison.plan.confidence)


_MEASURES: dict[Figure, tuple[Callable[[Comparison, Expectation], Interval], str, str]] = {
    Figure.PERPLEXITY: (_perplexity, "perplexity at {at}, x full", "{:.3f}"),
    Figure.FOUND: (_found, "{task} at {at}{depths}, found", "{:.0%}"),
    Figure.LOGPROB: (_logprob, "needles at {at}{depths}, nats lost", "{:.2f}"),
    Figure.MEMORY: (_memory, "KV cache at {at}, x {shorter}", "{:.2f}"),
    Figure.TPOT: (_tpot, "time per token at {at}, x {shorter}", "{:.2f}"),
}
"""How a figure is found in a comparison, what it is called, and how it is written."""


def table(findings: Sequence[Finding]) -> RenderableType:
    """Expected and measured figures, a row each; below, a line for each that is not as known."""
    grid = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("attention", "figure", "known", "measured", ""):
        grid.add_column(column, overflow="fold")
    for finding in findings:
        expectation = finding.expectation
        grid.add_row(
            expectation.deployment,
            _figure(expectation),
            _bounds(expectation),
            _measured(finding),
            Text(finding.held, style=_STYLES[finding.held]),
        )
    notes = [_note(each) for each in findings if each.held is not Held.YES]
    return Group(Text("\nWhat is known of the default model", style="bold"), grid, *map(Text, notes))


def _note(finding: Finding) -> str:
    expectation = finding.expectation
    why = finding.note or f"it is known because {expectation.reason}"
    return f"{finding.held}: {expectation.deployment}, {_figure(expectation)}: {why}"


def _figure(expectation: Expectation) -> str:
    first, last = expectation.depths
    return _MEASURES[expectation.figure][1].format(
        at=length_label(expectation.length),
        shorter=length_label(expectation.shorter),
        task="pass key" if expectation.task == SINGLE else "needles",
        depths="" if (first, last) == (0.0, 1.0) else f", depths {first:g}-{last:g}",
    )


def _bounds(expectation: Expectation) -> str:
    write = _MEASURES[expectation.figure][2].format
    if math.isinf(expectation.most):
        return f"{write(expectation.least)} or more"
    if math.isinf(expectation.least):
        return f"{write(expectation.most)} or less"
    return f"{write(expectation.least)} to {write(expectation.most)}"


def _measured(finding: Finding) -> str:
    measured = finding.measured
    if math.isnan(measured.value):
        return "-"
    write = _MEASURES[finding.expectation.figure][2].format
    if finding.expectation.figure is Figure.FOUND:
        return f"{write(measured.value)} of {measured.count}"
    if measured.claimed:
        return f"{write(measured.value)} ({write(measured.low)} to {write(measured.high)})"
    return write(measured.value)
