"""A measurement as one HTML file with two plots, both axes logarithmic."""

from __future__ import annotations

from functools import partial
from typing import Any

from loadtest.direct.growth.document import SCHEMA
from loadtest.direct.growth.table import LEGEND, Series, cell, heading, series, unfinished
from loadtest.direct.growth.types import Growth
from loadtest.document import plain
from loadtest.measuring.types import Interval
from loadtest.report import page, words
from loadtest.report.chart import Chart, room_for
from loadtest.report.drawing import Drawing, drawing
from loadtest.report.look import look
from loadtest.report.scale import Axis, span
from loadtest.report.svg import Size


def render(growth: Growth) -> str:
    """The report."""
    variants = growth.survey.variants
    return page.render(
        "growth.html.j2",
        title=f"Cost as work grows: {growth.survey.model['name']}",
        heading=[heading(growth), growth.created],
        notes=[
            *growth.survey.notes,
            *([growth.busy] if growth.busy else []),
            *(f"{name}: {short}" for name, short in unfinished(growth)),
        ],
        legend=LEGEND,
        series=[
            {"drawing": drawn, **_table(growth, each)}
            for drawn, each in zip(drawings(growth), series(growth), strict=True)
        ],
        missing=[(variant.name, reason) for variant in variants for reason in growth.reasons(variant)],
        facts=_facts(growth),
        json=page.embedded({"schema": SCHEMA, **plain(growth)}),
        json_name="longspan-growth.json",
    )


def drawings(growth: Growth) -> list[Drawing]:
    """Milliseconds per token by context length, and by streams."""
    caption = "Medians of the rounds with their intervals, both axes logarithmic. Lower is better."
    return [
        drawing(
            f"growth-{each.key}",
            f"Milliseconds per token {each.name}",
            caption,
            partial(_draw, growth, each),
        )
        for each in series(growth)
    ]


def _draw(growth: Growth, drawn: Series, size: Size) -> Chart:
    lines = {}
    for number, variant in enumerate(growth.survey.variants):
        found = [(float(at), growth.seconds(variant.name, point).scaled(1e3)) for at, point in drawn.points]
        if line := [(at, one) for at, one in found if one.count]:
            lines[number] = line
    places = [float(at) for at, _ in drawn.points]
    low, high = span(places, log=True, pad=0.02)
    shown = [interval for line in lines.values() for _, interval in line]
    values = [end for one in shown for end in (one.value, one.low, one.high)]
    bottom, top = span(values, log=True, pad=0.05)
    x = Axis(drawn.axis, low, high, True, tuple(places), lambda tick: words.tokens(int(tick)))
    y = Axis("milliseconds per token", bottom, top, True)
    names = [(number, growth.survey.variants[number].name) for number in lines]
    chart = Chart(size, x, y, right=room_for([name for _, name in names], size))
    for number, name in names:
        chart.series(lines[number], look(number), partial(_told, name))
    chart.names([(lines[number][-1][1].value, name, look(number)) for number, name in names])
    return chart


def _told(name: str, at: float, found: Interval) -> str:
    return f"{name}: {words.number(found.value)} ms at {at:g}"


def _table(growth: Growth, shown: Series) -> dict[str, Any]:
    rows = []
    for number, variant in enumerate(growth.survey.variants):
        cells = []
        for _, point in shown.points:
            value = growth.seconds(variant.name, point).value * 1e3
            first, *others = cell(growth, variant.name, point)
            cells.append((first, value, ", ".join(others)))
        rows.append({"name": variant.name, "number": number, "cells": cells})
    return {"heads": ["attention", *(str(at) for at, _ in shown.points)], "rows": rows}


def _facts(growth: Growth) -> list[tuple[str, str]]:
    facts = [("versions", words.pairs(growth.survey.versions))]
    for variant in growth.survey.variants:
        options = " ".join(f"{name}={value}" for name, value in variant.options.items())
        told = f"{options}; longspan serve {' '.join(variant.arguments)}".removeprefix("; ")
        facts.append((variant.name, told))
    return facts
