"""Drawings of a load test: throughput against latency, percentiles, and requests over time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import pairwise
from statistics import median

from loadtest.load.result import Result, Run
from loadtest.load.rows import Row, rows
from loadtest.measuring.types import Interval
from loadtest.report import labels, words
from loadtest.report.chart import Chart
from loadtest.report.drawing import Drawing, drawing
from loadtest.report.look import Look, look
from loadtest.report.scale import Axis, from_zero, span
from loadtest.report.svg import FONT, HALF, Size, element, over, shortened, width_of
from loadtest.report.svg import words as line_of

_PERCENTILES = {"p50": 5.5, "p90": 4.0, "p95": 3.0, "p99": 5.5}
_ROW = 27.0


def drawings(result: Result, before: Result | None = None) -> list[Drawing]:
    """All that the result has figures for.

    Args:
        result: to be drawn.
        before: an earlier result, whose throughput is drawn beside it.
    """
    found = rows(result)
    closed = [row for row in found if row.load["kind"] == "closed"]
    parts = []
    if len(found) > 1 or before is not None:
        parts.append(throughput(found, [] if before is None else rows(before)))
    if len({row.load["concurrency"] for row in closed}) > 2:
        parts.append(_users(closed))
    for name, title in (("ttft", "Time to first token"), ("chunk_gap", "Between messages")):
        parts.append(_percentiles(name, title, found))
    return parts + [_over_time(number, row) for number, row in enumerate(found) if row.runs[0].requests]


def throughput(after: Sequence[Row], before: Sequence[Row] = ()) -> Drawing:
    """Output tokens per second against median latency, one point per load."""
    series = _series(after)
    earlier = {f"{name}, before": one for name, one in _series(before).items()}
    looks = {name: look(number) for number, name in enumerate([*series, *earlier], start=1)}

    def draw(size: Size) -> Chart:
        points = [_place(row) for row in [*after, *before]]
        x = from_zero("output tokens per second", [x for x, _ in points], pad=0.12)
        y = from_zero("median latency, s", [y for _, y in points])
        chart = Chart(size, x, y)
        for name, one in (earlier | series).items():
            chart.line([_place(row) for row in one], looks[name])
            for row in one:
                at = _place(row)
                if not all(map(math.isfinite, at)):
                    continue
                told = f"{row.label}: {words.number(at[0])} tok/s, {words.seconds(at[1])}"
                chart.point(*at, looks[name], told, hollow=name in earlier)
        _name(chart, after, before)
        if len(looks) > 1:
            chart.names_below(looks.items())
        return chart

    caption = "One point per load. Down and right is better."
    return drawing("throughput", "Throughput against latency", caption, draw, wide=HALF)


def _name(chart: Chart, after: Sequence[Row], before: Sequence[Row]) -> None:
    """Writes the load beside each point, where no other name, no point and, if possible, no line is."""

    def at(row: Row) -> tuple[float, float]:
        x, y = _place(row)
        return chart.at_x(x), chart.at_y(y)

    named = [row for row in after if all(map(math.isfinite, _place(row)))]
    points, texts = [at(row) for row in named], [row.runs[0].load_label for row in named]
    taken = [at(row) for row in before if all(map(math.isfinite, _place(row)))]
    for one in _series(named).values():
        for (x1, y1), (x2, y2) in pairwise(map(at, one)):
            steps = 1 + int(math.hypot(x2 - x1, y2 - y1) / 12)
            taken += [(x1 + (x2 - x1) * step / steps, y1 + (y2 - y1) * step / steps) for step in range(steps)]
    boxes = labels.place(
        points,
        [(width_of(text), FONT + 3.0) for text in texts],
        labels.Box(chart.left, chart.top, chart.right, chart.bottom),
        [labels.Box(x - 6, y - 6, x + 6, y + 6) for x, y in taken],
    )
    for (x, _), box, text in zip(points, boxes, texts, strict=True):
        anchor, place = box.anchor(x)
        chart.add(over(text, place, box.top + FONT, anchor))


def _series(found: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of one target and kind of load, by both."""
    series: dict[str, list[Row]] = {}
    for row in found:
        series.setdefault(f"{row.target}, {row.load['kind']} loop", []).append(row)
    return series


def _place(row: Row) -> tuple[float, float]:
    return row.cells["output_rate"].interval.value, row.cells["latency_p50"].interval.value


def _users(closed: Sequence[Row]) -> Drawing:
    series = _series(closed)

    def draw(size: Size) -> Chart:
        users = sorted({row.load["concurrency"] for row in closed})
        log = users[-1] / users[0] >= 4
        low, high = span(users, log=log, pad=0.04)
        rates = [row.cells["output_rate"].interval for row in closed]
        y = from_zero("output tok/s", [end for rate in rates for end in (rate.value, rate.high)])
        chart = Chart(size, Axis("users", low, high, log, tuple(users)), y)
        for number, (name, own) in enumerate(series.items(), start=1):
            points = [(row.load["concurrency"], row.cells["output_rate"].interval) for row in own]
            chart.series(points, look(number), partial(_told, name))
        if len(series) > 1:
            chart.names_below([(name, look(number)) for number, name in enumerate(series, start=1)])
        return chart

    caption = "Output tokens per second of all users together, as users are added."
    return drawing("users", "Users", caption, draw, wide=HALF)


def _told(name: str, users: float, rate: Interval) -> str:
    return f"{name}, {users:g} users: {words.number(rate.value)} tok/s"


def _percentiles(name: str, title: str, found: Sequence[Row]) -> Drawing:
    """One line per load, from the median to the 99th percentile."""
    values = {row.label: _shares(row.runs, name) for row in found}
    names = [row.label for row in found]

    def draw(size: Size) -> Chart:
        letters = 14 if size.narrow else 22
        known = [value for shares in values.values() for value in shares.values()]
        x = from_zero("milliseconds", known)
        y = Axis(
            "",
            len(names) - 0.5,
            -0.5,
            ticks=tuple(range(len(names))),
            show=lambda tick: shortened(names[int(tick)], letters),
        )
        chart = Chart(Size(size.width, 80 + _ROW * len(names), size.narrow), x, y, grid=False)
        for number, (label, shares) in enumerate(values.items()):
            if not math.isfinite(shares["p50"]):
                continue
            chart.line([(shares["p50"], number), (shares["p99"], number)], Look("var(--series-1)", ""), 1.4)
            for percentile, radius in _PERCENTILES.items():
                told = f"{label}: {percentile} {words.seconds(shares[percentile] / 1e3)}"
                mark = Look("var(--series-1)", "circle" if percentile in ("p50", "p99") else "bar")
                chart.point(shares[percentile], number, mark, told, percentile == "p99", radius)
        return chart

    caption = "Disc: median; strokes: 90th and 95th percentile; ring: 99th."
    return drawing(f"percentiles-{name}", title, caption, draw, wide=HALF)


def _shares(runs: Sequence[Run], name: str) -> dict[str, float]:
    """Milliseconds by percentile; the median over repeats."""
    found = {}
    for percentile in _PERCENTILES:
        values = [getattr(getattr(run.summary, name), percentile) * 1e3 for run in runs]
        finite = [value for value in values if math.isfinite(value)]
        found[percentile] = median(finite) if finite else math.nan
    return found


def _over_time(number: int, row: Row) -> Drawing:
    run = row.runs[0]
    receiving = _steps((r["first"], r["ended"]) for r in run.requests if r["first"] is not None)
    waiting = _steps((r["sent"], r["ended"] if r["first"] is None else r["first"]) for r in run.requests)
    caption = "Requests that wait for their first token, and that receive tokens, as the client saw it"
    caption += f"; the first of {len(row.runs)} repeats." if len(row.runs) > 1 else "."
    draw = partial(_timeline, [("receiving", receiving, look(1)), ("waiting", waiting, look(2))])
    return drawing(f"time-{number}", f"Requests over time, {row.label}", caption, draw, wide=HALF)


def _timeline(series: Sequence[tuple[str, list[tuple[float, float]], Look]], size: Size) -> Chart:
    points = [point for _, steps, _ in series for point in steps]
    most = max((count for _, count in points), default=1.0)
    chart = Chart(
        size,
        Axis("seconds", 0.0, max((when for when, _ in points), default=1.0) or 1.0),
        Axis("requests", 0.0, most * 1.08 or 1.0, ticks=_whole(most)),
    )
    for _, steps, own in series:
        chart.line(steps, own, 1.6, stepped=True, filled=True)
    for place, (name, _, own) in enumerate(series):
        x, y = chart.right - 90, chart.top - 14 + place * (FONT + 3)
        chart.add(element("rect", x=x, y=y - 9, width=9, height=9, fill=own.color))
        chart.add(line_of(name, x + 14, y))
    return chart


def _whole(most: float) -> tuple[float, ...]:
    """Whole numbers for the ticks of a count."""
    step = max(1, round(most / 5))
    return tuple(float(tick) for tick in range(0, int(most) + 1, step))


def _steps(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """How many of the spans are open at each time at which one begins or ends."""
    events = sorted(event for begin, end in spans for event in ((begin, 1), (end, -1)))
    steps, open_now = [(0.0, 0.0)], 0
    for when, change in events:
        open_now += change
        steps.append((when, float(open_now)))
    return steps
