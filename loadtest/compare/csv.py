"""The rows of a comparison as CSV files: one per kind of measurement, with a header."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from loadtest import document
from loadtest.compare.types import Comparison
from loadtest.evaluation.types import Answer, Memory, TextBlock
from loadtest.measuring.types import Measurement, Weather


def write(comparison: Comparison, folder: Path) -> None:
    """Writes ``answers.csv``, ``text.csv``, ``speed.csv`` and ``memory.csv``; an empty cell is no figure.

    A row of ``answers.csv`` is one question, with the names that kvpress's evaluation gives its columns
    (``task``, ``predicted_answer``, ``answer``; the last a JSON list). One of ``text.csv`` is a block of text
    with the sum of its tokens' log probabilities, one of ``speed.csv`` a cell measured once, its
    figures in seconds, tokens per second and counts.

    Args:
        comparison: with the rows.
        folder: made if it is not there; files in it of these names are replaced.

    Raises:
        OSError: they can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = list(dict.fromkeys(name for row in comparison.speed for name in row.figures))
    tables = {
        "answers.csv": (_names(Answer), [_answer(row) for row in comparison.answers]),
        "text.csv": (
            ["deployment", "length", "block", "start", "tokens", "logprob", "kl", "same_top", "error"],
            [_block(row) for row in comparison.text],
        ),
        "speed.csv": (
            [name for name in _names(Measurement) if name not in ("figures", "weather")]
            + figures
            + _names(Weather),
            [_cell(row) for row in comparison.speed],
        ),
        "memory.csv": (_names(Memory), [asdict(row) for row in comparison.memory]),
    }
    for name, (header, rows) in tables.items():
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, header, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _value(row.get(key)) for key in header} for row in rows)
        document.write(text.getvalue(), folder / name)


def _names(kind: type) -> list[str]:
    return [field.name for field in fields(kind)]


def _answer(row: Answer) -> dict[str, Any]:
    return asdict(row) | {"answer": json.dumps(row.answer, ensure_ascii=False)}


def _block(row: TextBlock) -> dict[str, Any]:
    logprob = math.fsum(row.logprobs) if row.logprobs else math.nan
    return asdict(row) | {"tokens": len(row.logprobs), "logprob": logprob}


def _cell(row: Measurement) -> dict[str, Any]:
    return asdict(row) | dict(row.figures) | asdict(row.weather)


def _value(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
