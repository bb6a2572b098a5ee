"""A measurement for a terminal."""

from __future__ import annotations

import math
from typing import NamedTuple

from rich.console import Group, RenderableType
from rich.text import Text

from loadtest.columns import Columns, figure
from loadtest.deployment import FULL
from loadtest.direct.growth.types import Growth, Point
from loadtest.document import cores_of

LEGEND = (
    "x: times as fast as full attention at the same point, paired by round, with its interval from 6 rounds "
    "on; /s: tokens of all streams"
)


class Series(NamedTuple):
    """Points along which one amount grows.

    Attributes:
        key: in file names.
        name: in words.
        axis: what grows.
        points: each with how much of it there is.
    """

    key: str
    name: str
    axis: str
    points: list[tuple[int, Point]]


def series(growth: Growth) -> list[Series]:
    """By context length, and by streams."""
    points = growth.points
    context, streams = points[0]
    plural = "s" if streams > 1 else ""
    return [
        Series(
            "context",
            f"by context length, {streams} stream{plural}",
            "tokens of context",
            [(point.context, point) for point in points if point.streams == streams],
        ),
        Series(
            "streams",
            f"by streams, {context} tokens of context each",
            "streams",
            [(point.streams, point) for point in points if point.context == context],
        ),
    ]


def heading(growth: Growth) -> str:
    """A description of the measurement, in a line."""
    model, machine = growth.survey.model, growth.machine
    parts = [
        f"{model['name']}, {model['dtype']}, weights {model['weights']}, KV {model['kv_dtype']}",
        f"{model['device']}, {cores_of(machine)}",
        f"medians of {growth.plan.steps} decode steps of the engine, called directly, twice in each of at "
        f"most {growth.plan.rounds} rounds",
        *([" ".join(growth.plan.arguments)] if growth.plan.arguments else []),
    ]
    return "; ".join(parts)


def cell(growth: Growth, variant: str, point: Point) -> list[str]:
    """A cell's lines: milliseconds, times as fast as full, and for several streams tokens per second."""
    own, ratio = growth.seconds(variant, point).value * 1e3, growth.ratio(variant, point)
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
    for each in series(growth):
        parts += [Text(), Text(f"milliseconds per token {each.name}", style="bold")]
        parts.append(_table(growth, each))
    parts.append(Text(LEGEND, style="dim"))
    if growth.busy:
        parts.append(Text(f"! {growth.busy}", style="red"))
    parts += [
        Text(f"! {variant.name}: {reason}", style="red")
        for variant in growth.survey.variants
        for reason in growth.reasons(variant)
    ]
    parts += [Text(f"{name}: {short}", style="dim") for name, short in unfinished(growth)]
    return Group(*parts)


def unfinished(growth: Growth) -> list[tuple[str, str]]:
    """Variants with points that the budget left without enough rounds for an interval, and which."""
    told = [(variant.name, growth.short(variant)) for variant in growth.survey.variants]
    return [(name, short) for name, short in told if short]


def _table(growth: Growth, shown: Series) -> Columns:
    grid = Columns("attention\nkernel", [str(amount) for amount, _ in shown.points])
    for variant in growth.survey.variants:
        name = Text(variant.name).append(f"\n{variant.kernel}" if variant.kernel else "", style="dim")
        grid.add_row(name, *("\n".join(cell(growth, variant.name, point)) for _, point in shown.points))
    return grid
