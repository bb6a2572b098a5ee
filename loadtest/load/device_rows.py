"""A table's rows of what loads made of the server's device, repeats together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from loadtest.load.device import DeviceUse
from loadtest.load.rows import Row

COLUMNS: tuple[tuple[str, str, Callable[[DeviceUse], float]], ...] = (
    ("memory used", "GB", lambda use: use.memory_used / 1e9),
    ("memory total", "GB", lambda use: use.memory_total / 1e9),
    ("bandwidth measured", "GB/s", lambda use: use.bandwidth / 1e9),
    ("bandwidth reached", "%", lambda use: use.bandwidth_share * 100),
    ("matrices measured", "GFLOP/s", lambda use: use.matrix_rate / 1e9),
    ("matrices reached", "%", lambda use: use.matrix_share * 100),
)
"""Name, unit, and how to get the figure in that unit."""


@dataclass(frozen=True, slots=True)
class DeviceRow:
    """All repeats of one load that count.

    Attributes:
        label: of the row of figures.
        devices: as the server calls them.
        figures: medians, one per column; NaN where a repeat lacks it.
        notes: why figures are missing, a sentence each.
    """

    label: str
    devices: tuple[str, ...]
    figures: tuple[float, ...]
    notes: tuple[str, ...]


def device_rows(found: Sequence[Row]) -> list[DeviceRow]:
    """One per row of figures whose runs read the server's metrics."""
    uses = [(row.label, [run.device for run in row.runs if run.device is not None]) for row in found]
    return [
        DeviceRow(
            label,
            tuple(dict.fromkeys(use.name for use in own)),
            tuple(median(get(use) for use in own) for _, _, get in COLUMNS),
            tuple(dict.fromkeys(note for use in own for note in use.unmeasured)),
        )
        for label, own in uses
        if own
    ]


def missing_shares(found: Sequence[DeviceRow]) -> list[str]:
    """Why shares are missing: said once where it concerns all rows, else for each row that it concerns."""
    said: dict[str, list[str]] = {}
    for row in found:
        for note in row.notes:
            said.setdefault(note, []).append(row.label)
    lines = []
    for note, labels in said.items():
        lines += [note] if len(labels) == len(found) else [f"{label}: {note}" for label in labels]
    return lines
