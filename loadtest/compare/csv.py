"""The rows of a comparison as CSV files: one per kind of measurement, with a header."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from loadtest import document
from loadtest.compare.types import Comparison
from loadtest.evaluation.types import Answer, Memory, TextBlock
from loadtest.measuring.types import Measurement

_WEATHER = ("stolen", "foreign", "throttled")


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Writes ``answers.csv``, ``text.csv``, ``speed.csv`` and ``memory.csv``; an empty cell is no figure.

    A row of ``answers.csv`` is one question, with the names that kvpress's evaluation gives its columns
    (``task``, ``predicted_answer``, ``answer``; the last a JSON list). One of ``text.csv`` is a block of text
    with the sum of its tokens' log probabilities, one of ``speed.csv`` a cell measured once, its
    figures in seconds, tokens per second and counts.

    Args:
        comparison: with the rows.
        folder: made if it is not there; files in it of these names are replaced.

    Returns:
        The files, in this order.

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
            + [*_WEATHER],
            [_cell(row) for row in comparison.speed],
        ),
        "memory.csv": (_names(Memory), [_flat(row) for row in comparison.memory]),
    }
    return [_save(folder / name, header, rows) for name, (header, rows) in tables.items()]


def _names(kind: type) -> list[str]:
    return [field.name for field in fields(kind)]


def _flat(row: Any) -> dict[str, Any]:
    return {name: getattr(row, name) for name in _names(type(row))}


def _answer(row: Answer) -> dict[str, Any]:
    return _flat(row) | {"answer": json.dumps(row.answer, ensure_ascii=False)}


def _block(row: TextBlock) -> dict[str, Any]:
    logprob = math.fsum(row.logprobs) if row.logprobs else math.nan
    return _flat(row) | {"tokens": len(row.logprobs), "logprob": logprob}


def _cell(row: Measurement) -> dict[str, Any]:
    return _flat(row) | dict(row.figures) | {name: getattr(row.weather, name) for name in _WEATHER}


def _save(path: Path, header: list[str], rows: Iterable[Mapping[str, Any]]) -> Path:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, header, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _value(row.get(name)) for name in header})
    document.write(text.getvalue(), path)
    return path


def _value(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
