"""A measurement for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from loadtest.deployment import FULL
from loadtest.growth.types import Growth, Point
from loadtest.load.table import figure

LEGEND = (
    "x: times as fast as full attention at the same point, paired by round, with its interval from 6 rounds "
    "on; /s: tokens of all streams"
)


def series(growth: Growth) -> list[tuple[str, list[Point]]]:
    """What grows, in words, with the points on the way."""
    points = growth.points
    context, streams = points[0]
    plural = "s" if streams > 1 else ""
    return [
        (
            f"by context length, {streams} stream{plural}",
            [point for point in points if point.streams == streams],
        ),
        (
            f"by streams, {context} tokens of context each",
            [point for point in points if point.context == context],
        ),
    ]


def milliseconds(growth: Growth, variant: str, point: Point) -> float:
    """From one token of a stream to its next; NaN where there is no figure."""
    return growth.seconds(variant, point).value * 1e3


def heading(growth: Growth) -> str:
    """What was measured, in a line."""
    model, machine = growth.survey.model, growth.machine
    parts = [
        f"{model['name']}, {model['dtype']}, weights {model['weights']}, KV {model['kv_dtype']}",
        f"{model['device']}, {machine['cores']} cores of {machine['cpu']}",
        f"medians of {growth.plan.steps} decode steps of the engine, called directly, twice in each of "
        f"{growth.plan.rounds} rounds",
        *([" ".join(growth.plan.arguments)] if growth.plan.arguments else []),
    ]
    return "; ".join(parts)


def cell(growth: Growth, variant: str, point: Point) -> list[str]:
    """A cell's lines: milliseconds, times as fast as full, and for several streams tokens per second."""
    own, ratio = milliseconds(growth, variant, point), growth.ratio(variant, point)
    lines = [figure(own)]
    if variant != FULL.name and not math.isnan(ratio.value):
        interval = f" ({ratio.low:.2f}-{ratio.high:.2f})" if ratio.claimed else ""
        lines.append(f"x {ratio.value:.2f}{interval}")
    if not math.isnan(own) and point.streams > growth.points[0].streams:
        lines.append(f"{figure(point.streams / own * 1e3)}/s")
    return lines


def table(growth: Growth) -> RenderableType:
    """One table by context and one by streams, and why figures are missing."""
    parts: list[RenderableType] = [Text(heading(growth), style="dim")]
    parts += [Text(note) for note in growth.survey.notes]
    for name, points in series(growth):
        parts += [Text(), Text(f"milliseconds per token {name}", style="bold")]
        parts.append(_table(growth, points, by_context=points[0].context != points[-1].context))
    parts.append(Text(LEGEND, style="dim"))
    if growth.busy:
        parts.append(Text(f"! {growth.busy}", style="red"))
    parts += [
        Text(f"! {variant.name}: {reason}", style="red")
        for variant in growth.survey.variants
        for reason in growth.reasons(variant)
    ]
    return Group(*parts)


def _table(growth: Growth, points: Sequence[Point], *, by_context: bool) -> Table:
    grid = Table(box=None, header_style="bold", pad_edge=False)
    grid.add_column("attention", no_wrap=True)
    grid.add_column("kernel", no_wrap=True)
    for point in points:
        grid.add_column(str(point.context if by_context else point.streams), justify="right", no_wrap=True)
    for variant in growth.survey.variants:
        cells = ["\n".join(cell(growth, variant.name, point)) for point in points]
        grid.add_row(variant.name, variant.kernel or "-", *cells)
    return grid
