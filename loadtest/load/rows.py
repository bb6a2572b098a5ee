"""A table's rows: runs of one load and target together, each figure with what is known of its error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loadtest.load.measures import SHARES
from loadtest.load.order_statistics import needed
from loadtest.load.result import Result, Run
from loadtest.load.types import Spread, Summary
from loadtest.measuring.types import Interval


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of a summary, as tables show it.

    Attributes:
        key: its name in documents.
        name: its name in tables.
        unit: that tables show it in.
        factor: from seconds, or per second, to that unit.
        more_is_better: a rate, not a time.
        get: the figure itself.
        distribution: the summary's distribution that it is a percentile of; empty for a rate.
        percentile: its name there.
    """

    key: str
    name: str
    unit: str
    factor: float
    more_is_better: bool
    get: Callable[[Summary], float]
    distribution: str = ""
    percentile: str = ""


def _rate(key: str, name: str, unit: str) -> Figure:
    return Figure(key, name, unit, 1.0, True, lambda summary: float(getattr(summary, key)))


def _percentile(distribution: str, name: str, percentile: str, unit: str, factor: float) -> Figure:
    return Figure(
        f"{distribution}_{percentile}",
        f"{name} {percentile}",
        unit,
        factor,
        False,
        lambda summary: float(getattr(getattr(summary, distribution), percentile)),
        distribution,
        percentile,
    )


FIGURES: tuple[Figure, ...] = (
    _rate("output_rate", "output", "tok/s"),
    _rate("prompt_rate", "prompt", "tok/s"),
    _rate("request_rate", "requests", "/s"),
    _percentile("ttft", "TTFT", "p50", "ms", 1e3),
    _percentile("ttft", "TTFT", "p99", "ms", 1e3),
    _percentile("tpot", "TPOT", "p50", "ms", 1e3),
    _percentile("tpot", "TPOT", "p99", "ms", 1e3),
    _percentile("chunk_gap", "gap", "p99", "ms", 1e3),
    _percentile("latency", "latency", "p50", "s", 1.0),
)
"""What tables show, in this order."""


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
        target: what the load was put on.
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
        from loadtest.statistics import median_interval  # numpy, which one run does not need

        return Cell(median_interval(values, confidence), True, weak)
    ends = [math.nan, math.nan]
    if figure.distribution:
        ends = getattr(runs[0].summary, figure.distribution).intervals.get(figure.percentile, ends)
    value = values[0] if values else math.nan
    return Cell(Interval(value, ends[0], ends[1], len(values)), False, weak)


def _weak(figure: Figure, runs: list[Run]) -> str:
    if not figure.distribution:
        return ""
    spreads: list[Spread] = [getattr(run.summary, figure.distribution) for run in runs]
    poor = [spread for spread in spreads if figure.percentile in spread.weak]
    if not poor:
        return ""
    least = min(spread.count for spread in poor)
    share = SHARES[figure.percentile]
    rank = math.ceil(share * least - 1e-9)
    place = "their largest" if rank == least else f"their {least - rank + 1}th largest"
    place = place.replace(" 2th", " 2nd").replace(" 3th", " 3rd")
    what = "messages" if figure.distribution == "chunk_gap" else "requests"
    return f"{figure.percentile} of {least} {what} is {place}; {needed(share)} or more can tell it"
