"""A comparison as one HTML file with two plots: quality against speed, and memory against length."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from loadtest.compare.table import COLUMNS, cells
from loadtest.compare.types import Comparison, Row
from loadtest.compare.verdict import judge, recommendation
from loadtest.html import COLORS, page, plot, text

_LEAST_NEEDLES = 0.999


def write_report(comparison: Comparison, path: Path) -> None:
    """Writes the report."""
    model, plan = comparison.model, comparison.plan
    machine = comparison.machine
    advice = "".join(f"<p class='advice'>{text(sentence)}</p>" for sentence in recommendation(comparison))
    judged = "".join(f"<li>{text(judgment.sentence)}</li>" for judgment in judge(comparison))
    longest = plan.contexts[-1]
    body = [
        f"<p class='dim'>{text(model.get('dtype'))}, KV {text(model.get('kv_dtype'))}, "
        f"{text(model.get('device'))}, "
        f"{text(machine.get('cores'))} cores of {text(machine.get('cpu'))}; text: {text(plan.text)}; "
        f"{text(comparison.created)}</p>",
        advice,
        plot(
            f"Quality against speed at {longest} tokens",
            lambda axes: _quality(axes, comparison, longest),
            "up and left is better; hollow where needles were lost that full attention found",
        ),
        plot(
            "Memory against length",
            lambda axes: _memory(axes, comparison),
            "KV cache that one sequence holds",
        ),
        f"<h2>What each brings and costs, against {text(plan.candidates[0].name)}</h2><ul>{judged}</ul>",
        *(_table(comparison, context) for context in plan.contexts),
        _facts(comparison),
    ]
    title = f"Which attention for {model.get('name')}?"
    path.write_text(page(title, body), encoding="utf-8")


def _quality(axes: Any, comparison: Comparison, context: int) -> None:
    base = comparison.row(comparison.plan.candidates[0].name, context)
    for number, row in enumerate(_rows(comparison, context)):
        x, y = row.tpot * 1e3, row.perplexity / base.perplexity
        if math.isnan(x) or math.isnan(y):
            continue
        lost = row.found_share < base.found_share * _LEAST_NEEDLES
        color = COLORS[number % len(COLORS)]
        axes.plot([x], [y], "o", color=color, markersize=9, markerfacecolor="white" if lost else color)
        axes.annotate(row.candidate, (x, y), textcoords="offset points", xytext=(7, 5), fontsize=8)
    axes.axhline(1.0, color="#9aa5b1", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.margins(x=0.2, y=0.2)
    axes.set(xlabel="milliseconds per output token", ylabel="perplexity, full attention = 1")


def _memory(axes: Any, comparison: Comparison) -> None:
    for number, candidate in enumerate(comparison.plan.candidates):
        rows = [comparison.row(candidate.name, context) for context in comparison.plan.contexts]
        axes.plot(
            [row.context for row in rows],
            [row.kv_bytes / 2**20 for row in rows],
            "o-",
            color=COLORS[number % len(COLORS)],
            label=candidate.name,
        )
    axes.set(xlabel="tokens", ylabel="MiB per sequence")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)


def _rows(comparison: Comparison, context: int) -> list[Row]:
    return [comparison.row(candidate.name, context) for candidate in comparison.plan.candidates]


def _table(comparison: Comparison, context: int) -> str:
    rows = _rows(comparison, context)
    head = "".join(
        f"<th>{text(name).replace(chr(10), '<br>')}</th>"
        for name in ("attention", *COLUMNS, "needles by depth", "kernel")
    )
    body = []
    for row in rows:
        depths = ", ".join(f"{depth:g}: {row.found.get(depth, 0)}/{n}" for depth, n in row.hidden.items())
        kernel = comparison.kernels.get(row.candidate, {}).get("kernel", "-")
        columns = [*cells(row, rows[0]), depths or "-", kernel]
        body.append(
            f"<tr><th>{text(row.candidate)}</th>"
            + "".join(f"<td>{text(cell)}</td>" for cell in columns)
            + "</tr>"
        )
        body += [
            f"<tr class='bad'><td colspan='{len(columns) + 1}'>{text(error)}</td></tr>"
            for error in row.errors
        ]
    rows_html = "".join(body)
    return f"<h2>{context} tokens</h2><table><thead><tr>{head}</tr></thead><tbody>{rows_html}</tbody></table>"


def _facts(comparison: Comparison) -> str:
    plan = comparison.plan
    rows = {
        "versions": ", ".join(f"{name} {version}" for name, version in comparison.versions.items()),
        "per candidate": "; ".join(
            f"{candidate.name}: longspan serve {' '.join(candidate.deployment.arguments)}"
            for candidate in plan.candidates
        ),
        "every server": " ".join(plan.arguments) or "no further arguments",
        "perplexity": "of the last three quarters of each context; "
        + "; ".join(
            f"{candidate.name}: served with {' '.join(candidate.predicting.arguments)}"
            for candidate in plan.candidates
            if candidate.predicting != candidate.deployment
        ),
    }
    facts = "".join(f"<tr><th>{text(name)}</th><td>{text(value)}</td></tr>" for name, value in rows.items())
    return f"<h2>What ran</h2><table class='facts'>{facts}</table>"
