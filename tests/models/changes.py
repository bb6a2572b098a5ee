"""Changes to the files of a checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Change = Callable[[Path], Any]
CONFIG, GENERATION, WEIGHTS = "config.json", "generation_config.json", "model.safetensors"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
ABSENT: Any = object()


def copy(good: Path, folder: Path) -> Path:
    """A folder whose files can be changed without changing those of ``good``."""
    folder.mkdir()
    for file in good.iterdir():
        os.link(file, folder / file.name)
    return folder


def put(file: Path, content: bytes) -> None:
    """Replaces a file, and not what is linked to it."""
    file.unlink(missing_ok=True)
    file.write_bytes(content)


def holds(name: str, content: str | bytes) -> Change:
    """The file has just this content."""
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: put(folder / name, data)


def edited(name: str, edit: Callable[[Any], Any]) -> Change:
    """The JSON file is edited in place."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        edit(content)
        put(folder / name, json.dumps(content).encode())

    return change


def says(**values: Any) -> Change:
    """The config has these values; without those that are ``ABSENT``."""

    def edit(config: dict[str, Any]) -> None:
        config |= values
        for name in [name for name, value in values.items() if value is ABSENT]:
            del config[name]

    return edited(CONFIG, edit)


def spelled(alter: Callable[[bytes], bytes], name: str = CONFIG) -> Change:
    """The bytes of a file are altered."""
    return lambda folder: put(folder / name, alter((folder / name).read_bytes()))


def header(edit: Callable[[dict[str, Any]], Any]) -> Change:
    """The header of the weights is edited."""

    def alter(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        said = json.loads(content[8 : 8 + length])
        edit(said)
        written = json.dumps(said).encode()
        return len(written).to_bytes(8, "little") + written + content[8 + length :]

    return spelled(alter, WEIGHTS)


def tensor(name: str, **values: Any) -> Change:
    """The header says other things of one tensor."""
    return header(lambda said: said[name].update(values))
