"""A result as one HTML file that needs nothing else: figures, plots, and what to know about them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from loadtest.document import plain
from loadtest.load.against import Change, Finding, changes, only_in_one
from loadtest.load.device_rows import COLUMNS as DEVICE_COLUMNS
from loadtest.load.device_rows import device_rows, missing_shares
from loadtest.load.plots import drawings
from loadtest.load.remarks import remarks_of
from loadtest.load.result import SCHEMA, Result
from loadtest.load.rows import FIGURES, Cell, Figure, Row, rows
from loadtest.load.table import differences, heading
from loadtest.report import page, words
from loadtest.report.figures import NOTHING
from loadtest.report.figures import Cell as Shown

_SIGNS = {Finding.BETTER: "▲ ", Finding.WORSE: "▼ ", Finding.NONE: "= ", Finding.UNTESTED: ""}


def render(result: Result, against: Result | None = None) -> str:
    """The report of a result with at least one run.

    Args:
        result: to be shown.
        against: an earlier result, for a table of before and after.
    """
    found = rows(result)
    goodput = any(run.summary.goodput is not None for run in result.runs)
    heads = ["load", *(f"{each.name}, {each.unit}" for each in FIGURES)]
    heads += (["good, %"] if goodput else []) + ["failed", "requests"]
    model = result.server.get("model") or ", ".join(result.peers) or "an endpoint"
    return page.render(
        "load.html.j2",
        title=f"Load test of {model}",
        heading=[*heading(result).plain.split("\n"), result.created],
        ended=result.ended,
        heads=heads,
        rows=[_row(row, goodput) for row in found],
        footnotes=_footnotes(found, result.confidence),
        remarks=[remark for row in found for remark in remarks_of(row)],
        against=None if against is None else _against(against, result),
        drawings=drawings(result, against),
        device=_device(found),
        facts=_facts(result),
        json=page.embedded({"schema": SCHEMA, **plain(result)}),
        json_name="longspan-load.json",
    )


def _footnotes(found: Sequence[Row], confidence: float) -> list[str]:
    """The meaning of brackets and signs in the table."""
    cells = [cell for row in found for cell in row.cells.values()]
    repeats = max(len(row.runs) for row in found)
    notes = []
    if repeats > 1:
        notes.append(f"Figures are medians of {repeats} runs.")
    if any(cell.across_runs and cell.interval.claimed for cell in cells):
        notes.append(f"In brackets: {confidence:.0%} intervals of these medians.")
    elif any(cell.interval.claimed for cell in cells):
        notes.append(
            f"In brackets: {confidence:.0%} intervals of percentiles within one run. From run to run figures "
            "differ more; --repeats 6 tells how much."
        )
    return notes + [f"? {weak}" for weak in dict.fromkeys(cell.weak for cell in cells if cell.weak)]


def _row(row: Row, goodput: bool) -> dict[str, Any]:
    cells = [_cell(each, row.cells[each.key]) for each in FIGURES]
    if goodput:
        cells.append(_shown(100 * row.goodput))
    requests = sum(run.summary.requests for run in row.runs)
    cells += [(str(row.failed), row.failed, ""), (f"{requests:,}", requests, "")]
    bad = any(run.objections or run.interrupted or run.disturbed for run in row.runs)
    return {"name": row.label, "kind": "bad" if bad else "", "cells": cells}


def _cell(each: Figure, cell: Cell) -> Shown:
    found = cell.interval.scaled(each.factor)
    note = words.ends(words.number, found) if found.claimed else ""
    return words.number(found.value) + ("?" if cell.weak else ""), found.value, note


def _against(before: Result, after: Result) -> dict[str, Any]:
    """Three rows per load that both have: before, after, and their ratios."""
    found = changes(before, after)
    table = []
    for label in dict.fromkeys(change.label for change in found):
        own = [change for change in found if change.label == label]
        for when, cells in (
            ("before", [_shown(change.before.value * change.figure.factor) for change in own]),
            ("after", [_shown(change.after.value * change.figure.factor) for change in own]),
            ("after / before", [_ratio(change) for change in own]),
        ):
            table.append({"name": label, "cells": [(when, when, ""), *cells]})
    notes = differences(before, after)
    if missing := only_in_one(before, after):
        notes.append(f"only in one of the two: {', '.join(missing)}")
    heads = ["load", "when", *(f"{each.name}, {each.unit}" for each in FIGURES)]
    return {"created": before.created, "heads": heads, "rows": table, "notes": notes}


def _shown(value: float) -> Shown:
    return words.number(value), value, ""


def _ratio(change: Change) -> Shown:
    ratio = change.ratio
    if not math.isfinite(ratio.value):
        return NOTHING
    ends = words.ends(words.ratio, ratio) if ratio.claimed else ""
    return f"{_SIGNS[change.finding]}{words.ratio(ratio.value)}", ratio.value, ends


def _device(found: Sequence[Row]) -> dict[str, Any] | None:
    uses = device_rows(found)
    if not uses:
        return None
    return {
        "name": ", ".join(dict.fromkeys(device for use in uses for device in use.devices)),
        "heads": ["load", *(f"{name}, {unit}" for name, unit, _ in DEVICE_COLUMNS)],
        "rows": [{"name": use.label, "cells": [_shown(each) for each in use.figures]} for use in uses],
        "notes": missing_shares(uses),
    }


def _facts(result: Result) -> list[tuple[str, str]]:
    server = result.server
    facts: Sequence[tuple[str, str]] = [
        ("client", words.pairs(result.machine)),
        ("versions", words.pairs(result.versions)),
        ("attention", words.pairs(server.get("attention", {}))),
        *((f"endpoint {name}", words.pairs(peer)) for name, peer in result.peers.items()),
        ("server's settings", ", ".join(f"{k}={v}" for k, v in sorted(server.get("settings", {}).items()))),
        ("confidence", f"{result.confidence:.0%}"),
        ("seed", str(result.seed)),
    ]
    return [(name, text) for name, text in facts if text]
