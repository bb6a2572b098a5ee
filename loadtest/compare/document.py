"""A comparison as one JSON document that a later run goes on with."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loadtest.compare.types import Candidate, Comparison, Plan
from loadtest.compare.verdict import judge, recommendation
from loadtest.quality.types import Deployment

SCHEMA = "longspan-compare/1"


class DocumentError(ValueError):
    """A file is no comparison, or one of another plan; the message says what to do."""


def save(comparison: Comparison, path: Path) -> None:
    """Writes the document in one go: an interrupted run leaves the last whole one."""
    document = {
        "schema": SCHEMA,
        **asdict(comparison),
        "judgments": [asdict(judgment) for judgment in judge(comparison)],
        "recommendation": recommendation(comparison),
    }
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(_plain(document), indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def load(path: Path) -> Comparison:
    """Reads a document.

    Raises:
        DocumentError: it is none, or of another schema.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DocumentError(f"{path} can't be read: {error}") from error
    if not isinstance(document, dict) or document.pop("schema", None) != SCHEMA:
        raise DocumentError(f"{path} is no result of longspan compare ({SCHEMA})")
    try:
        plan = document.pop("plan")
        candidates = [
            Candidate(_deployment(entry["deployment"]), _deployment(entry["predicting"]), entry["exact"])
            for entry in plan.pop("candidates")
        ]
        rest: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in plan.items()
        }
        for name in ("judgments", "recommendation"):
            document.pop(name, None)
        return Comparison(plan=Plan(candidates=tuple(candidates), **rest), **document)
    except (KeyError, TypeError) as error:
        raise DocumentError(f"{path} is damaged: {error}") from error


def go_on_with(comparison: Comparison, path: Path) -> Comparison:
    """The comparison in the file, if it is of the same plan; what failed then is measured again.

    Raises:
        DocumentError: there is a file, but it is of another plan or no comparison.
    """
    if not path.exists():
        return comparison
    earlier = load(path)
    if earlier.plan != comparison.plan:
        raise DocumentError(
            f"{path} has a comparison of other candidates, contexts, text or settings; name another file, or "
            "remove it"
        )
    earlier.cells = {name: cell for name, cell in earlier.cells.items() if "error" not in cell}
    return earlier


def _deployment(entry: dict[str, Any]) -> Deployment:
    return Deployment(entry["name"], entry["attention"], entry["options"], tuple(entry["others"]))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value - value != 0:  # infinite, or no number
        return None
    return value
