"""The whole run: all parts that fit into the time, and what they add up to."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Mapping
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from loadtest.direct import work
from loadtest.direct.device import report
from loadtest.direct.device.forms import Form
from loadtest.direct.device.rows import rows
from loadtest.document import machine


def load_parts() -> Mapping[str, work.Part]:
    """The parts, which import torch."""
    from loadtest.direct.device.parts import PARTS

    return PARTS


def bench(form: Form, folder: Path | None, seconds: float, console: Console) -> tuple[report.Document, bool]:
    """Runs all parts that fit.

    Args:
        form: what is measured.
        folder: for the model, which stays there for the next time; ``None`` for a temporary one.
        seconds: after which a part that still runs is ended.
        console: told what goes on.

    Returns:
        The findings, and whether nothing failed.
    """
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="longspan-device-") if folder is None else nullcontext(folder)
    ) as place:
        findings = work.run(
            load_parts,
            form.seconds,
            (form, Path(place)),
            began + seconds,
            needed=frozenset({"machine", "model"}),
            apart=frozenset({"transformers"} if form.cuda else set()),
            say=lambda part: console.print(f"{time.monotonic() - began:4.0f} s: {part}", style="dim"),
        )
    document = report.Document(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        form=form.name,
        shape=dataclasses.asdict(form.shape),
        machine=machine(),
        facts=findings.facts,
        figures=findings.figures,
        seconds={part: round(taken, 3) for part, taken in findings.seconds.items()},
        rows=rows(form, findings),
    )
    return document, not findings.failed
