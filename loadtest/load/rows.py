"""A table's rows: runs of one load and target together, each figure with what is known of its error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from loadtest.load.measures import SHARES, percentile
from loadtest.load.order_statistics import needed
from loadtest.load.result import Result, Run
from loadtest.load.types import Spread, Summary
from loadtest.measuring.types import Interval


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of a summary, as tables show it: a rate, or a percentile of times.

    Attributes:
        field: of the summary: the rate, or the distribution.
        name: in tables.
        unit: that tables show it in.
        factor: from seconds, or per second, to that unit.
        percentile: its name in the distribution; empty for a rate.
    """

    field: str
    name: str
    unit: str
    factor: float = 1.0
    percentile: str = ""

    @property
    def key(self) -> str:
        """Its name in documents."""
        return f"{self.field}_{self.percentile}" if self.percentile else self.field

    @property
    def more_is_better(self) -> bool:
        """It is a rate, not a time."""
        return not self.percentile

    def get(self, summary: Summary) -> float:
        """The figure itself."""
        found = getattr(summary, self.field)
        return float(getattr(found, self.percentile) if self.percentile else found)


FIGURES = (
    Figure("output_rate", "output", "tok/s"),
    Figure("prompt_rate", "prompt", "tok/s"),
    Figure("request_rate", "requests", "/s"),
    Figure("ttft", "TTFT p50", "ms", 1e3, "p50"),
    Figure("ttft", "TTFT p99", "ms", 1e3, "p99"),
    Figure("tpot", "TPOT p50", "ms", 1e3, "p50"),
    Figure("tpot", "TPOT p99", "ms", 1e3, "p99"),
    Figure("chunk_gap", "gap p99", "ms", 1e3, "p99"),
    Figure("latency", "latency p50", "s", 1.0, "p50"),
)
"""The figures of tables, in this order."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One figure of a row.

    Attributes:
        interval: the figure, of one run, or the median over its repeats; in seconds or per second.
        across_runs: the interval is of the median over repeats; else of a percentile within one run,
            as if its requests were independent.
        weak: why the sample cannot carry this percentile, a sentence; empty if it can.
    """

    interval: Interval
    across_runs: bool
    weak: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """All repeats of one load on one target.

    Attributes:
        label: load, sizes and target.
        target: of the load.
        load: see ``Run.load``.
        runs: those that count, in the order in which they ran: the undisturbed ones, or if there are none the
            last attempt at each repeat.
        disturbed: those that other work on this machine disturbed.
        cells: by key of the figure, all of ``FIGURES``.
    """

    label: str
    target: str
    load: dict[str, Any]
    runs: list[Run]
    disturbed: list[Run]
    cells: dict[str, Cell]

    @property
    def failed(self) -> int:
        """Requests of all runs that count."""
        return sum(sum(run.summary.failed.values()) for run in self.runs)

    @property
    def goodput(self) -> float:
        """The mean over the runs that count; NaN without targets."""
        goods = [run.summary.goodput for run in self.runs if run.summary.goodput is not None]
        return sum(goods) / len(goods) if goods else math.nan


def rows(result: Result) -> list[Row]:
    """One row per label, in the order in which labels first ran."""
    together: dict[str, list[Run]] = {}
    for run in result.runs:
        together.setdefault(run.label, []).append(run)
    return [_row(label, runs, result.confidence) for label, runs in together.items()]


def clean(result: Result) -> bool:
    """Every run that counts is valid and whole, and no request failed."""
    return all(
        not (run.objections or run.disturbed or run.interrupted or run.summary.failed)
        for row in rows(result)
        for run in row.runs
    )


def _row(label: str, runs: list[Run], confidence: float) -> Row:
    quiet = [run for run in runs if not run.disturbed]
    counted = quiet or list({run.repeat: run for run in runs}.values())
    return Row(
        label,
        runs[0].target,
        runs[0].load,
        counted,
        [run for run in runs if run.disturbed],
        {figure.key: cell(figure, counted, confidence) for figure in FIGURES},
    )


def cell(figure: Figure, runs: list[Run], confidence: float) -> Cell:
    """A figure of the repeats of one load."""
    values = [value for run in runs if not math.isnan(value := figure.get(run.summary))]
    weak = _weak(figure, runs)
    if len(runs) > 1:
        from loadtest.measuring.statistics import median_interval  # numpy, which one run does not need

        return Cell(median_interval(values, confidence), True, weak)
    ends = [math.nan, math.nan]
    if figure.percentile:
        ends = getattr(runs[0].summary, figure.field).intervals.get(figure.percentile, ends)
    value = values[0] if values else math.nan
    return Cell(Interval(value, ends[0], ends[1], len(values)), False, weak)


def _weak(figure: Figure, runs: list[Run]) -> str:
    if not figure.percentile:
        return ""
    spreads: list[Spread] = [getattr(run.summary, figure.field) for run in runs]
    poor = [spread for spread in spreads if figure.percentile in spread.weak]
    if not poor:
        return ""
    least = min(spread.count for spread in poor)
    share = SHARES[figure.percentile]
    # Fewer than are needed have no percentile that is told below their third largest.
    place = ("largest", "2nd largest", "3rd largest")[least - int(percentile(range(1, least + 1), share))]
    what = "messages" if figure.field == "chunk_gap" else "requests"
    return f"{figure.percentile} of {least} {what} is their {place}; {needed(share)} or more can tell it"
