"""A measurement as one HTML file with two plots, both axes logarithmic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

<<<<<<< HEAD
from loadtest.document import plain
from loadtest.growth.document import SCHEMA
from loadtest.growth.table import cell, heading, milliseconds, series
=======
from matplotlib.ticker import LogLocator, NullFormatter

from loadtest.growth.table import LEGEND, cell, heading, milliseconds, series
>>>>>>> core
from loadtest.growth.types import Growth, Point
from loadtest.report import page, words
from loadtest.report.chart import Chart
from loadtest.report.drawing import Drawing, drawing
from loadtest.report.look import look
from loadtest.report.scale import Axis, span
from loadtest.report.svg import Size

_NAMES = 185.0


def write_report(growth: Growth, path: Path) -> None:
<<<<<<< HEAD
    """Writes the report.

    Raises:
        OSError: it can't be written.
    """
    path.write_text(render(growth), encoding="utf-8")


def render(growth: Growth) -> str:
    """The report; see ``write_report``."""
    variants = growth.survey.variants
    return page.render(
        "growth.html.j2",
        title=f"Cost as work grows: {growth.survey.model['name']}",
        live=False,
        heading=[heading(growth), growth.created],
        notes=growth.survey.notes,
        series=[
            {"drawing": drawn, **_table(growth, points)}
            for drawn, (_, points) in zip(drawings(growth), series(growth), strict=True)
        ],
        missing=[(variant.name, reason) for variant in variants for reason in growth.reasons(variant)],
        facts=_facts(growth),
        json=page.embedded({"schema": SCHEMA, **plain(growth)}),
        json_name="longspan-growth.json",
=======
    """Writes the report."""
    body = [f"<p class='dim'>{text(heading(growth))}; {text(growth.created)}</p>"]
    body += [f"<p>{text(note)}</p>" for note in (*growth.survey.notes, growth.busy) if note]
    for name, points in series(growth):
        by_context = points[0].context != points[-1].context

        def draw(axes: Any, points: Sequence[Point] = points, by_context: bool = by_context) -> None:
            _draw(axes, growth, points, by_context)

        body.append(
            plot(
                f"Milliseconds per token {name}",
                draw,
                f"median of the rounds; in the table, {LEGEND}",
            )
        )
        body.append(_table(growth, points, by_context))
    body += [_missing(growth), _facts(growth)]
    title = f"Cost as work grows: {growth.survey.model['name']}"
    path.write_text(page(title, body), encoding="utf-8")


def _draw(axes: Any, growth: Growth, points: Sequence[Point], by_context: bool) -> None:
    for number, variant in enumerate(growth.survey.variants):
        known = [point for point in points if growth.seconds(variant.name, point).count]
        if known:
            axes.plot(
                [_at(point, by_context) for point in known],
                [milliseconds(growth, variant.name, point) for point in known],
                "o-",
                color=COLORS[number % len(COLORS)],
                markersize=4,
                label=variant.name,
            )
    ticks = [_at(point, by_context) for point in points]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set(xlabel="tokens of context" if by_context else "streams", ylabel="milliseconds per token")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _at(point: Point, by_context: bool) -> int:
    return point.context if by_context else point.streams


def _table(growth: Growth, points: Sequence[Point], by_context: bool) -> str:
    head = "".join(f"<th>{_at(point, by_context)}</th>" for point in points)
    rows = []
    for variant in growth.survey.variants:
        cells = ""
        for point in points:
            first, *others = cell(growth, variant.name, point)
            cells += f"<td>{first}{''.join(f'<br><small>{other}</small>' for other in others)}</td>"
        rows.append(f"<tr><th>{text(variant.name)}</th>{cells}</tr>")
    return f"<table><thead><tr><th>attention</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _missing(growth: Growth) -> str:
    items = "".join(
        f"<li><b>{text(variant.name)}</b>: {text(reason)}</li>"
        for variant in growth.survey.variants
        for reason in growth.reasons(variant)
>>>>>>> core
    )


def drawings(growth: Growth) -> list[Drawing]:
    """Milliseconds per token by context length, and by streams."""
    caption = "Median of the steps, both axes logarithmic. Lower is better."
    return [
        drawing(
            f"growth-{number}",
            f"Milliseconds per token {name}",
            caption,
            partial(_draw, growth, points),
        )
        for number, (name, points) in enumerate(series(growth))
    ]


def _draw(growth: Growth, points: Sequence[Point], size: Size) -> Chart:
    lines = {
        number: [(float(_at(points, point)), milliseconds(growth, variant.name, point)) for point in points]
        for number, variant in enumerate(growth.survey.variants)
    }
    lines = {number: line for number, line in lines.items() if any(math.isfinite(y) for _, y in line)}
    places = [float(_at(points, point)) for point in points]
    low, high = span(places, log=True, pad=0.02)
    bottom, top = span([y for line in lines.values() for _, y in line], log=True, pad=0.05)
    x = Axis(
        "tokens of context" if _by_context(points) else "streams",
        *(low, high, True, tuple(places)),
        lambda tick: words.tokens(int(tick)) if _by_context(points) else f"{tick:.0f}",
    )
    y = Axis("milliseconds per token", bottom, top, True)
    chart = Chart(size, x, y, right=12 if size.narrow else _NAMES)
    for number, line in lines.items():
        name = growth.survey.variants[number].name
        chart.line(line, look(number))
        for at, value in line:
            if math.isfinite(value):
                chart.point(at, value, look(number), f"{name}: {words.number(value)} ms at {at:g}", radius=4)
    names = [(number, growth.survey.variants[number].name) for number in lines]
    if size.narrow:
        chart.names_below([(name, look(number)) for number, name in names])
    else:
        ends = {number: [y for _, y in line if math.isfinite(y)][-1] for number, line in lines.items()}
        chart.names_beside([(ends[number], name, look(number)) for number, name in names])
    return chart


def _by_context(points: Sequence[Point]) -> bool:
    return points[0].context != points[-1].context


def _at(points: Sequence[Point], point: Point) -> int:
    return point.context if _by_context(points) else point.streams


def _table(growth: Growth, points: Sequence[Point]) -> dict[str, Any]:
    rows = []
    for number, variant in enumerate(growth.survey.variants):
        cells = []
        for point in points:
            value = milliseconds(growth, variant.name, point)
            first, *others = cell(growth, variant.name, point)
            cells.append((first, value if math.isfinite(value) else "", ", ".join(others)))
        rows.append({"name": variant.name, "number": number, "cells": cells})
    return {"heads": ["attention", *(str(_at(points, point)) for point in points)], "rows": rows}


def _facts(growth: Growth) -> list[tuple[str, str]]:
    facts = [("versions", ", ".join(f"{name} {value}" for name, value in growth.survey.versions.items()))]
    for variant in growth.survey.variants:
        options = " ".join(f"{name}={value}" for name, value in variant.options.items())
        told = f"{options}; longspan serve {' '.join(variant.arguments)}".removeprefix("; ")
        facts.append((variant.name, told))
    return facts
