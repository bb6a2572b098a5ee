"""Outcomes for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from loadtest.quality.types import Outcome


def table(outcomes: Sequence[Outcome]) -> Table:
    """One row per outcome, to be printed with rich."""
    result = Table()
    for column in ("test", "figure", "measured", "expected", ""):
        result.add_column(column)
    last = None
    for outcome in outcomes:
        if last is not None and outcome.test != last:
            result.add_section()
        verdict = "[green]pass[/]" if outcome.passed else "[red]FAIL[/]"
        test = "" if outcome.test == last else str(outcome.test)
        result.add_row(test, outcome.what, outcome.measured, outcome.expected, verdict)
        last = outcome.test
    return result


def as_json(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """One object per outcome."""
    return [asdict(outcome) for outcome in outcomes]
