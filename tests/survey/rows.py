"""Every row of docs/models.md: what it is called, in which table it stands, and how it is tried."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tests.survey import table
from tests.survey.architectures import Case, cases
from tests.survey.forms import FORMS, Form, try_form
from tests.survey.outcome import Outcome
from tests.survey.table import Section
from tests.survey.try_one import try_case


class Entry(NamedTuple):
    """One row before it is tried.

    Attributes:
        section: its table.
        more: its second cell.
        what: what to try.
    """

    section: Section
    more: str
    what: Case | Form


def entries() -> dict[str, Entry]:
    """By name, in the page's order."""
    models = {
        case.name: Entry(table.VARIANTS if case.variant else table.ARCHITECTURES, case.class_name, case)
        for case in cases()
    }
    # Some forms are called as the model types that have them.
    forms = {f"{form.name} (form)" if form.name in models else form.name: form for form in FORMS}
    return models | {name: Entry(table.FORMS, form.kind, form) for name, form in forms.items()}


def attempt(name: str, folder: Path) -> Outcome:
    """Tries one row.

    Args:
        name: of the row.
        folder: an empty folder.
    """
    what = entries()[name].what
    return try_form(what, folder) if isinstance(what, Form) else try_case(what, folder)
