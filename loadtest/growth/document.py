"""A measurement as one JSON document."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from loadtest import document
from loadtest.growth.types import Growth

SCHEMA = "longspan-growth/1"


def save(growth: Growth, path: Path) -> None:
    """Writes the document; see ``loadtest.document.save``."""
    content = asdict(growth)
    for entry, measurement in zip(content["measurements"], growth.measurements, strict=True):
        entry["median"] = measurement.median
    document.save({"schema": SCHEMA, **content}, path)
