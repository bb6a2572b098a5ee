"""A measurement as one JSON document."""

from __future__ import annotations

from pathlib import Path

from loadtest import document
from loadtest.deployment import FULL
from loadtest.direct.growth.types import Growth

SCHEMA = "longspan-growth/2"


def save(growth: Growth, path: Path) -> None:
    """Writes the document, with ``figures`` beside what was measured: what tables show of each point."""
    figures = [
        {
            "variant": variant.name,
            "context": point.context,
            "streams": point.streams,
            "seconds": growth.seconds(variant.name, point),
            "times_faster": None if variant.name == FULL.name else growth.ratio(variant.name, point),
        }
        for variant in growth.survey.variants
        for point in growth.points
    ]
    document.save({"schema": SCHEMA, **document.plain(growth), "figures": figures}, path)
