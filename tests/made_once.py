"""Folders of small models that a process makes once, and writes from memory from then on."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Concatenate, ParamSpec

# Larger ones are made again each time.
_MOST_BYTES = 4 << 20
P = ParamSpec("P")
_Save = Callable[Concatenate[str, Path, P], Path]


def made_once(save: _Save[P]) -> _Save[P]:
    """Of a function that writes the same files whenever its kind and its options are the same."""
    kept: dict[str, dict[Path, bytes]] = {}

    @functools.wraps(save)
    def written(kind: str, folder: Path, *more: P.args, **options: P.kwargs) -> Path:
        name = json.dumps([kind, more, options], default=repr)
        files = kept.get(name)
        if files is None:
            with tempfile.TemporaryDirectory() as place:
                made = save(kind, Path(place), *more, **options)
                found = [file for file in made.rglob("*") if file.is_file()]
                files = {file.relative_to(made): file.read_bytes() for file in found}
            if sum(map(len, files.values())) <= _MOST_BYTES:
                kept[name] = files
        for file, content in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(content)
        return folder

    return written
