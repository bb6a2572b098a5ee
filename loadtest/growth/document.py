"""A measurement as one JSON document."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from loadtest.growth.types import Growth

SCHEMA = "longspan-growth/1"


def save(growth: Growth, path: Path) -> None:
    """Writes the document in one go, so that an interrupted run leaves the last whole one."""
    document = asdict(growth)
    for entry, measurement in zip(document["measurements"], growth.measurements, strict=True):
        entry["median"] = measurement.median
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps({"schema": SCHEMA, **document}, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
