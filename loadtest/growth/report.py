"""A measurement as one HTML file with two plots, both axes logarithmic."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import LogLocator, NullFormatter

from loadtest.growth.table import LEGEND, cell, heading, milliseconds, series
from loadtest.growth.types import Growth, Point
from loadtest.html import COLORS, page, plot, text


def write_report(growth: Growth, path: Path) -> None:
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
    )
    return f"<h2>What is missing, and why</h2><ul>{items}</ul>" if items else ""


def _facts(growth: Growth) -> str:
    rows = {"versions": ", ".join(f"{name} {value}" for name, value in growth.survey.versions.items())}
    for variant in growth.survey.variants:
        options = " ".join(f"{name}={value}" for name, value in variant.options.items())
        rows[variant.name] = f"{options}; longspan serve {' '.join(variant.arguments)}".removeprefix("; ")
    facts = "".join(f"<tr><th>{text(name)}</th><td>{text(value)}</td></tr>" for name, value in rows.items())
    return f"<h2>What ran</h2><table class='facts'>{facts}</table>"
