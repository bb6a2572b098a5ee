"""The generated tables of docs/models.md: written, read again, and compared."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.survey.outcome import MISSING, Outcome, Verdict

FILE = Path(__file__).resolve().parents[2] / "docs" / "models.md"


class Row(NamedTuple):
    """One row: what was tried, something more about it, and what became of it."""

    name: str
    more: str
    outcome: Outcome


class Section(NamedTuple):
    """One table of the page.

    Attributes:
        marker: names the comments between which it stands.
        columns: the first two headings.
    """

    marker: str
    columns: tuple[str, str]


ARCHITECTURES = Section("architectures", ("model type", "class"))
VARIANTS = Section("variants", ("model type, variant", "class"))
FORMS = Section("forms", ("form", "kind"))
BUGS = (Verdict.WRONG, Verdict.CRASHED)
SECTIONS = (ARCHITECTURES, VARIANTS, FORMS)

_ORDER = tuple(Verdict)


def write(section: Section, rows: Sequence[Row], versions: Mapping[str, str]) -> None:
    """Replaces the section's table in the page."""
    counts = Counter(row.outcome.verdict for row in rows)
    said = ", ".join(f"{counts[verdict]} {verdict}" for verdict in _ORDER if counts[verdict])
    made = " and ".join(f"{name} {version}" for name, version in versions.items())
    lines = [
        f"{len(rows)} rows, made with {made}: {said}.",
        "",
        f"| {section.columns[0]} | {section.columns[1]} | result | compared beyond, or why |",
        "|---|---|---|---|",
        *(
            f"| {_cell(row.name)} | {_cell(row.more)} | {row.outcome.verdict} | {_cell(row.outcome.detail)} |"
            for row in rows
        ),
    ]
    begin, end = _markers(section)
    text = FILE.read_text()
    head, tail = text.index(begin) + len(begin), text.index(end)
    FILE.write_text(text[:head] + "\n" + "\n".join(lines) + "\n" + text[tail:])


def read(section: Section) -> dict[str, Row]:
    """The section's rows as they stand in the page, by name."""
    begin, end = _markers(section)
    text = FILE.read_text()
    part = text[text.index(begin) : text.index(end)]
    rows = {}
    for line in part.splitlines():
        cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 4 and cells[2] in set(Verdict):
            name, more, verdict, detail = cells
            rows[name] = Row(name, more, Outcome(Verdict(verdict), detail))
    return rows


def differs(recorded: Outcome | None, found: Outcome) -> str:
    """How an outcome differs from the page's; empty if it does not. Numbers of a sentence may vary."""
    if recorded is None:
        return f"docs/models.md has no such row: {found.verdict}, {found.detail}"
    if MISSING in (recorded.detail[-len(MISSING) :], found.detail[-len(MISSING) :]):
        return ""  # another machine has other packages
    if (recorded.verdict, _wording(recorded.detail)) == (found.verdict, _wording(found.detail)):
        return ""
    return (
        f"docs/models.md says {recorded.verdict}, {recorded.detail!r}; it is {found.verdict}, "
        f"{found.detail!r}: if that is right, run make models"
    )


def _markers(section: Section) -> tuple[str, str]:
    return f"<!-- {section.marker}: written by make models -->", f"<!-- end of {section.marker} -->"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _wording(detail: str) -> str:
    return re.sub(r"\d+(\.\d+)?(e-?\d+)?", "N", _cell(detail))
