"""Writes what was measured as a JSON document; ``loadtest.load.result`` reads it."""

from __future__ import annotations

from pathlib import Path

from loadtest import document
from loadtest.document import plain
from loadtest.load.result import SCHEMA, Result
from loadtest.load.rows import rows


def save(result: Result, path: Path) -> None:
    """Writes the document, with the figures of all repeats together.

    Raises:
        OSError: it can't be written.
    """
    figures = [
        {
            "label": row.label,
            "target": row.target,
            "figure": key,
            **plain(cell.interval),
            "across_runs": cell.across_runs,
            "weak": cell.weak,
        }
        for row in rows(result)
        for key, cell in row.cells.items()
    ]
    document.save({"schema": SCHEMA, **plain(result), "figures": figures}, path)
