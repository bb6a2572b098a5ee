"""The files of one GGUF model: one, or the numbered parts of a split set. Imports nothing heavy."""

from __future__ import annotations

import re
from pathlib import Path

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)


def find_parts(file: Path) -> list[Path]:
    """All files of the set that ``file`` belongs to, in order; ``file`` alone if it is no part of one.

    Raises:
        ValueError: a part is missing, or the name numbers none of the set; the message says which.
    """
    match = _PART.fullmatch(file.name)
    if match is None:
        return [file]
    count = int(match["count"])
    if not 1 <= int(match["number"]) <= count:
        raise ValueError(
            f"its name says that it is part {int(match['number'])} of {count}; give it the name that it was "
            "published with"
        )
    parts = [
        file.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}{file.suffix}")
        for number in range(1, count + 1)
    ]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise ValueError(
            f"it is split into {count} files, of which {len(missing)} are missing, {missing[0]} among them; "
            "put all of them into one folder"
        )
    return parts


def model_stem(file: Path) -> str:
    """The file's name without its ending and without its number in a split set."""
    match = _PART.fullmatch(file.name)
    if match:
        return match["stem"]
    return file.stem if file.suffix.lower() == ".gguf" else file.name
