"""The main drawing of a comparison: loss against gain, at the longest context."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loadtest.compare.gains import deciding_figure, is_served, operators_load
from loadtest.compare.phrases import measure, setting
from loadtest.compare.types import Comparison, Gain, Judgment, Outcome, Verdict
from loadtest.measuring.types import Interval, length_label
from loadtest.report import labels, view, words
from loadtest.report.chart import Chart
from loadtest.report.drawing import Drawing, drawing
from loadtest.report.look import Look, look
from loadtest.report.scale import Axis, span
from loadtest.report.svg import FONT, HALF, WIDE, Size, over, shortened, width_of

_MOST_LOSS = 3.0  # shares of the margin beyond which losses are drawn at the edge
_LEAST_LOSS = -0.6
_MOST_RATIO = 3.0  # an interval of a few samples must not squeeze all points into a corner
_LOG_FROM = 4.0
_ROOM = 52.0  # of a drawing's width that a point's name takes; where there is less, names stand below


@dataclass(frozen=True, slots=True)
class _Point:
    name: str
    look: Look
    gain: Interval
    loss: Interval
    words: str
    outcome: Outcome | None


def quality_against_speed(comparison: Comparison, judgment: Judgment) -> Drawing | None:
    """Loss against the figure that the operator's load is judged by; ``None`` before both are known."""
    context = comparison.plan.contexts[-1]
    load = operators_load(comparison, context)
    if load is None:
        return None
    per_token = deciding_figure(load) == "tpot"
    return _drawing(
        "speed",
        f"Quality against speed at {length_label(context)}",
        "times as fast per token as full" if per_token else "times as many tokens per second as full",
        f"Load: {load.label}; every server has as much KV memory. ",
        comparison,
        judgment,
        lambda one: view.speed(one, comparison, context) if is_served(comparison, one.deployment) else None,
        judgment.advice.quality_speed,
        WIDE,
    )


def quality_against_memory(comparison: Comparison, judgment: Judgment) -> Drawing | None:
    """Loss against bytes of KV cache; ``None`` before both are known."""
    context = comparison.plan.contexts[-1]
    return _drawing(
        "memory",
        f"Quality against memory at {length_label(context)}",
        "times smaller KV cache per sequence than full's",
        "With the same memory, so many times as many sequences fit. ",
        comparison,
        judgment,
        lambda verdict: view.gain(verdict, comparison, context, "bytes"),
        judgment.advice.quality_memory,
        HALF,
    )


def _drawing(
    key: str,
    title: str,
    label: str,
    remark: str,
    comparison: Comparison,
    judgment: Judgment,
    gain: Callable[[Verdict], Gain | None],
    front: Sequence[str],
    wide: Size,
) -> Drawing | None:
    points = _points(comparison, judgment, gain)
    if len(points) < 2:
        return None
    drawn = {point.name for point in points}
    missing = [each.name for each in comparison.plan.candidates if each.name not in drawn]
    measures = [name for name in missing if not is_served(comparison, name)]
    missing = [name for name in missing if name not in measures]
    caption = (
        f"{remark}Up and right is better. Down: what a variant loses in its worst test, as a share of its "
        f"margin; the red line is the margin. Bars: {setting(comparison.plan.confidence)} intervals. "
        "Hollow: not shown safe."
        + (" The dashed line joins the variants that no other beats in both." if len(front) > 1 else "")
        + (f" Not drawn, since it is not for serving: {', '.join(measures)}." if measures else "")
        + (f" Not drawn, since there is no figure: {', '.join(missing)}." if missing else "")
    )
    description = "; ".join(f"{point.name}: {point.words}" for point in points)

    def draw(size: Size) -> Chart:
        return _draw(size, label, points, front)

    return drawing(f"quality-{key}", title, caption, draw, description, wide)


def _points(
    comparison: Comparison, judgment: Judgment, gain: Callable[[Verdict], Gain | None]
) -> list[_Point]:
    context, numbers = comparison.plan.contexts[-1], view.numbers(comparison)
    full = comparison.plan.full
    points = [_Point(full, look(0), Interval(1.0), Interval(0.0), "the baseline", None)]
    for verdict in judgment.verdicts:
        found, evidence = gain(verdict), view.worst(verdict, context)
        if found is None or not math.isfinite(found.ratio.value) or (evidence is None and not verdict.exact):
            continue
        loss, told = Interval(0.0), "exact"
        if evidence is not None:
            loss = view.used(evidence)
            told = f"{measure(evidence.measure)} {words.loss(evidence.unit, evidence.loss.value)}"
        told = f"{words.ratio(found.ratio.value)}, {told}"
        points.append(
            _Point(
                verdict.deployment,
                look(numbers[verdict.deployment]),
                found.ratio,
                loss,
                told,
                verdict.outcome,
            )
        )
    return points


def _draw(size: Size, label: str, points: Sequence[_Point], front: Sequence[str]) -> Chart:
    x, y = _axes(label, points)
    chart = Chart(size, x, y, grid=False)
    chart.band(1.0, y.high, "var(--safe)")
    chart.band(y.low, 1.0, "var(--unsafe)")
    chart.rule(y=1.0, color="var(--unsafe)")
    chart.rule(x=1.0, color="var(--dim)", dash="2 4")
    taken = _intervals(chart, points)
    _name_bands(chart, taken)
    ends = sorted((point.gain.value, point.loss.value) for point in points if point.name in front)
    chart.line(ends, Look("var(--dim)", "", "4 4"), 1.4)
    for point in points:
        if point.gain.claimed:
            chart.interval(
                (point.gain.low, point.gain.high), (point.loss.value, point.loss.value), point.look.color
            )
        if point.loss.claimed:
            chart.interval(
                (point.gain.value, point.gain.value), (point.loss.low, point.loss.high), point.look.color
            )
    for point in points:
        hollow = point.outcome not in (None, Outcome.SAFE)
        note = f"{point.name}: {point.words}" + (f"; {point.outcome}" if point.outcome else "")
        chart.point(point.gain.value, point.loss.value, point.look, note, hollow)
    if len(points) > size.width / _ROOM:
        chart.names_below([(point.name, point.look) for point in points])
    else:
        _name(chart, size, points, [*taken, *_along(chart, ends)])
    return chart


def _axes(label: str, points: Sequence[_Point]) -> tuple[Axis, Axis]:
    gains, losses = [], []
    for point in points:
        value = point.gain.value
        gains += [
            value,
            *(min(max(end, value / _MOST_RATIO), value * _MOST_RATIO) for end in _ends(point.gain)),
        ]
        losses += [min(max(end, _LEAST_LOSS), _MOST_LOSS) for end in (point.loss.value, *_ends(point.loss))]
    known = [gain for gain in gains if math.isfinite(gain) and gain > 0]
    log = max(known) / min(known) > _LOG_FROM
    low, high = span(known, include=(0.95, 1.05), pad=0.08, log=log)
    top, bottom = span(losses, include=(-0.15, 1.35), pad=0.06)
    return (
        Axis(label, low, high, log, show=_times),
        Axis("loss, in shares of the margin", bottom, top, show=words.share),
    )


def _times(value: float) -> str:
    return f"{words.plain(value)}\N{MULTIPLICATION SIGN}"


def _ends(interval: Interval) -> tuple[float, ...]:
    return (interval.low, interval.high) if interval.claimed else ()


def _name_bands(chart: Chart, taken: list[labels.Box]) -> None:
    """Says what lies above and below the margin, on the side where less is in the way; takes that room."""
    at = chart.at_y(1.0)
    marks = [labels.Box(box.left - 8, box.top - 8, box.right + 8, box.bottom + 8) for box in taken]
    sides = [
        ("end", chart.right - 8, labels.Box(chart.right - 120, at - 18, chart.right, at + 18)),
        ("start", chart.left + 8, labels.Box(chart.left, at - 18, chart.left + 120, at + 18)),
    ]
    anchor, x, box = min(sides, key=lambda side: sum(side[2].shared(mark) for mark in marks))
    chart.add(over("within the margin", x, at - 6, anchor, "var(--safe)", font_size=11))
    chart.add(over("too much is lost", x, at + FONT + 4, anchor, "var(--unsafe)", font_size=11))
    taken.append(box)


def _intervals(chart: Chart, points: Sequence[_Point]) -> list[labels.Box]:
    """Where the points and their intervals are."""
    boxes = []
    for point in points:
        x, y = chart.at_x(point.gain.value), chart.at_y(point.loss.value)
        boxes.append(labels.Box(x - 3, y - 3, x + 3, y + 3))
        if point.gain.claimed:
            boxes.append(labels.Box(chart.at_x(point.gain.low), y - 3, chart.at_x(point.gain.high), y + 3))
        if point.loss.claimed:
            ends = chart.at_y(point.loss.low), chart.at_y(point.loss.high)
            boxes.append(labels.Box(x - 3, min(ends), x + 3, max(ends)))
    return boxes


def _along(chart: Chart, front: Sequence[tuple[float, float]]) -> list[labels.Box]:
    """Where the line through these points is."""
    boxes: list[labels.Box] = []
    corners = [(chart.at_x(x), chart.at_y(y)) for x, y in front]
    for (x1, y1), (x2, y2) in itertools.pairwise(corners):
        steps = max(1, int(math.hypot(x2 - x1, y2 - y1) / 6))
        along = [(x1 + (x2 - x1) * step / steps, y1 + (y2 - y1) * step / steps) for step in range(steps + 1)]
        boxes += [labels.Box(x - 3, y - 3, x + 3, y + 3) for x, y in along]
    return boxes


def _name(chart: Chart, size: Size, points: Sequence[_Point], taken: Sequence[labels.Box]) -> None:
    """Writes names where nothing else is; with figures where there is room."""
    places = [(chart.at_x(point.gain.value), chart.at_y(point.loss.value)) for point in points]
    texts = [
        [shortened(point.name, 30), *([_second(chart, point)] if len(points) <= size.width / 120 else [])]
        for point in points
    ]
    sizes = [(max(map(width_of, text)), (FONT + 3.0) * len(text)) for text in texts]
    room = labels.Box(chart.left, chart.top, chart.right, chart.bottom)
    for (x, y), box, text in zip(places, labels.place(places, sizes, room, taken), texts, strict=True):
        near_x, near_y = min(max(x, box.left), box.right), min(max(y, box.top), box.bottom)
        if math.hypot(near_x - x, near_y - y) > 20:
            chart.leader(x, y, near_x, near_y)
        anchor, at = box.anchor(x)
        chart.add(over(text[0], at, box.top + FONT, anchor, font_weight=600))
        if text[1:]:
            chart.add(over(text[1], at, box.top + 2 * FONT + 2, anchor, "var(--dim)", font_size=11))


def _second(chart: Chart, point: _Point) -> str:
    beyond = point.loss.value > chart.y.low or point.gain.value > chart.x.high
    return point.words + (" (beyond the edge)" if beyond else "")
