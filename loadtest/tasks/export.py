"""Samples as lines of JSON, for other programs.

The columns that kvpress's evaluation reads have its names: context, question, answer_prefix, answer, task,
max_new_tokens. The others are those of ``Sample``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from loadtest.tasks.types import Sample

_NAMES = frozenset(field.name for field in fields(Sample))


def write(samples: Iterable[Sample], file: Path) -> None:
    """Writes a line for each sample, in UTF-8.

    Raises:
        OSError: the file cannot be written.
    """
    with file.open("w", encoding="utf-8") as out:
        for sample in samples:
            out.write(json.dumps(asdict(sample), ensure_ascii=False) + "\n")


def read(file: Path) -> list[Sample]:
    """The samples of a file that ``write`` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is no sample.
    """
    return [
        _sample(line, f"{file}, line {number}")
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1)
        if line.strip()
    ]


def _sample(line: str, place: str) -> Sample:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place} is no JSON ({error}); write the file anew") from error
    if not isinstance(row, dict) or row.keys() != _NAMES:
        raise ValueError(f"{place} is no sample: one has {', '.join(sorted(_NAMES))}; write the file anew")
    return Sample(**{**row, "answer": tuple(row["answer"])})
