"""A comparison for a terminal."""

from __future__ import annotations

import math

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from loadtest.compare.types import Comparison, Row
from loadtest.compare.verdict import judge, recommendation
from loadtest.load.table import figure

COLUMNS = (
    "prefill\ntok/s",
    "TTFT\ns",
    "per token\nms",
    "KV\nMiB",
    "fit\nsequences",
    "perplexity\n",
    "needles\nfound",
)


def cells(row: Row, base: Row) -> list[str]:
    """A row's figures as text; perplexity with its difference from ``base``."""
    perplexity = figure(row.perplexity)
    if row.candidate != base.candidate and not math.isnan(row.perplexity / base.perplexity):
        perplexity += f" ({row.perplexity / base.perplexity - 1:+.1%})"
    hidden = sum(row.hidden.values())
    return [
        figure(row.prefill_rate),
        figure(row.ttft),
        figure(row.tpot * 1e3),
        figure(row.kv_bytes / 2**20),
        "-" if math.isnan(row.fits) else str(int(row.fits)),
        perplexity,
        f"{sum(row.found.values())} of {hidden}" if hidden else "-",
    ]


def table(comparison: Comparison) -> RenderableType:
    """Figures by context, what each variant brings and costs, and the recommendation."""
    plan, model = comparison.plan, comparison.model
    grid = Table(box=None, header_style="bold", pad_edge=False)
    grid.add_column("context", justify="right")
    grid.add_column("attention", no_wrap=True)
    for column in COLUMNS:
        grid.add_column(column, justify="right", no_wrap=True)
    for context in plan.contexts:
        base = comparison.row(plan.candidates[0].name, context)
        for number, candidate in enumerate(plan.candidates):
            row = comparison.row(candidate.name, context)
            grid.add_row("" if number else str(context), candidate.name, *cells(row, base))
        grid.add_row()
    heading = Text(
        f"{model.get('name')}, {model.get('dtype')}, KV {model.get('kv_dtype')}, {model.get('device')}, "
        f"{comparison.machine.get('cores')} cores of {comparison.machine.get('cpu')}; text: {plan.text}",
        style="dim",
    )
    judged = [Text(f"- {judgment.sentence}") for judgment in judge(comparison)]
    advice = [Text(sentence, style="bold") for sentence in recommendation(comparison)]
    errors = dict.fromkeys(f"! {row.candidate}, {error}" for row in comparison.rows() for error in row.errors)
    notes = [Text(error, style="red") for error in errors]
    return Group(heading, grid, *judged, Text(), *advice, *notes)
