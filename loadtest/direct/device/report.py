"""The benchmark's outcome for people and for programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loadtest.direct.device.rows import Row

_COLORS = {"reached": "green", "missed": "yellow", "left out": "dim", "failed": "red"}
_MEMORY = "_memory"


@dataclass(frozen=True, slots=True)
class Document:
    """Everything that was found.

    Attributes:
        created: UTC, ISO 8601.
        form: ``whole`` or ``small``.
        shape: of the model, see ``shapes.Shape``.
        machine: ``cpu``, ``cores``, ``memory_bytes``, ``system``.
        facts: texts by name: ``device``, ``versions``, ``attention``, ``numbers`` and others.
        figures: numbers by name, in seconds, bytes, and these per second.
        seconds: that each part took.
        rows: the table.
        schema: of this document.
    """

    created: str
    form: str
    shape: dict[str, int]
    machine: dict[str, Any]
    facts: dict[str, str]
    figures: dict[str, float]
    seconds: dict[str, float]
    rows: list[Row]
    schema: Literal["longspan-device/1"] = "longspan-device/1"


def show(document: Document, console: Console) -> None:
    """Prints the table, and under it the facts about it."""
    facts = document.facts
    device = escape(facts.get("device", "unknown device"))
    table = Table(title=f"{device}, {document.form} form", title_justify="left")
    for column in ("", "measured", "against", "ratio", "aim", ""):
        table.add_column(column, justify="left" if column == "" else "right")
    for row in document.rows:
        color = _COLORS[row.verdict]
        table.add_row(
            escape(row.what),
            _number(row.figure, row.unit),
            f"{_number(row.against, row.unit)}\n[dim]{escape(row.base)}[/]",
            "" if row.ratio is None else f"{row.ratio:.2f}",
            f"{'≥' if row.at_least else '≤'} {row.aim:g}",
            f"[{color}]{row.verdict}[/]" + (f"\n[dim]{escape(row.note)}[/]" if row.note else ""),
        )
    console.print(table)
    for name, fact in facts.items():
        if fact and name != "device" and not name.endswith("_note"):
            console.print(f"[dim]{name.replace('_', ' ')}:[/] {escape(fact)}", highlight=False)
    memory = {
        name.removesuffix(_MEMORY): f"{number / 2**30:.2f} GiB"
        for name, number in document.figures.items()
        if name.endswith(_MEMORY)
    }
    for title, entries in (
        ("memory in use", memory),
        ("took", {part: f"{seconds:.0f} s" for part, seconds in document.seconds.items()}),
    ):
        if entries:
            text = ", ".join(f"{name} {entry}" for name, entry in entries.items())
            console.print(f"[dim]{title}:[/] {text}", highlight=False)


def _number(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:,.{1 if value >= 100 else 3}f} {unit}"
