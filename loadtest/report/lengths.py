"""The cost of a sequence as it grows: KV memory, TPOT and TTFT, a line per candidate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

from loadtest.compare.gains import deciding_figure, is_served, new_prompts, operators_load, under_load
from loadtest.compare.types import Comparison, Judgment
from loadtest.measuring.types import Interval, Load, length_label
from loadtest.report import view, words
from loadtest.report.chart import Chart, room_for
from loadtest.report.drawing import Drawing, drawing
from loadtest.report.look import look
from loadtest.report.scale import Axis, from_zero, span
from loadtest.report.svg import HALF, Size

_Lines = Mapping[str, list[tuple[int, Interval]]]


def memory(comparison: Comparison) -> Drawing | None:
    """KV memory of one sequence; ``None`` before anything is known."""
    lines = {
        name: sorted(
            (row.length, Interval(row.bytes / 2**20, count=1))
            for row in comparison.memory
            if row.deployment == name and math.isfinite(row.bytes)
        )
        for name in view.numbers(comparison)
    }
    caption = "What one sequence holds of the KV cache while it is continued. Lower is better."
    return _drawing("memory-length", "KV memory against length", caption, "MiB", comparison, lines)


def speed(comparison: Comparison, judgment: Judgment) -> Drawing | None:
    """The figure that the operator's loads are judged by; ``None`` with fewer than two lengths."""
    loads = {context: operators_load(comparison, context) for context in comparison.plan.contexts}
    figures = {deciding_figure(load) for load in loads.values() if load is not None}
    if len(figures) != 1:
        return None
    figure = figures.pop()
    by_token = figure == "tpot"
    lines = _speeds(comparison, judgment, figure, loads)
    if by_token:
        lines = {
            name: [(length, found.scaled(1e3)) for length, found in line] for name, line in lines.items()
        }
    title = "Time per token against length" if by_token else "Tokens per second against length"
    better = "Lower" if by_token else "Higher"
    users = next(load for load in loads.values() if load is not None).label.partition(", ")[2]
    caption = f"{users.capitalize()}; bars: intervals. {better} is better."
    unit = "milliseconds" if by_token else "tokens per second"
    return _drawing("speed-length", title, caption, unit, comparison, lines)


def first_token(comparison: Comparison, judgment: Judgment) -> Drawing | None:
    """Time to first token of new prompts; ``None`` with fewer than two lengths."""
    loads = {context: new_prompts(comparison, context) for context in comparison.plan.contexts}
    lines = _speeds(comparison, judgment, "ttft", loads)
    caption = "New prompts, prefill included; bars: intervals. Lower is better."
    return _drawing(
        "ttft-length", "Time to first token against length", caption, "seconds", comparison, lines
    )


def _speeds(
    comparison: Comparison, judgment: Judgment, figure: str, loads: Mapping[int, Load | None]
) -> _Lines:
    full = comparison.plan.full
    lines: dict[str, dict[int, Interval]] = {full: {}}
    for verdict in judgment.verdicts:
        if not is_served(comparison, verdict.deployment):
            continue
        own = lines.setdefault(verdict.deployment, {})
        for context, load in loads.items():
            if gain := under_load(verdict.gains, load, figure):
                own[context], lines[full][context] = gain.own, gain.full
    known = {
        name: sorted((context, found) for context, found in line.items() if math.isfinite(found.value))
        for name, line in lines.items()
    }
    return known if len({context for line in known.values() for context, _ in line}) > 1 else {}


def _drawing(
    key: str, title: str, caption: str, unit: str, comparison: Comparison, lines: _Lines
) -> Drawing | None:
    known = {name: line for name, line in lines.items() if line}
    if not known:
        return None
    numbers = view.numbers(comparison)

    def draw(size: Size) -> Chart:
        lengths = sorted({length for line in known.values() for length, _ in line})
        log = lengths[-1] / lengths[0] >= 8
        low, high = span(lengths, log=log, pad=0.03)
        x = Axis(
            "tokens of the sequence", low, high, log, tuple(lengths), lambda tick: length_label(int(tick))
        )
        shown = [found for line in known.values() for _, found in line]
        y = from_zero(unit, [end for found in shown for end in (found.value, found.high)])
        chart = Chart(size, x, y, right=room_for(known, size))
        for name, line in known.items():
            chart.series(line, look(numbers[name]), partial(_told, name, unit))
        chart.names([(line[-1][1].value, name, look(numbers[name])) for name, line in known.items()])
        return chart

    return drawing(key, title, caption, draw, wide=HALF)


def _told(name: str, unit: str, length: float, found: Interval) -> str:
    return f"{name}: {words.number(found.value)} {unit} at {length_label(int(length))}"
