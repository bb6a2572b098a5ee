"""JSON files of a checkpoint, read within bounds. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from server.errors import RefusedError, quoted

# The index of a thousand files with a million tensors has a tenth of it.
_MOST_BYTES = 1 << 30


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        RefusedError: the file can't be read, holds something else, or gives a key two values, of which
            readers take one without a word.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise RefusedError(f"{path} can't be read: it holds no JSON object")
    return content


def read_json(path: Path) -> Any:
    """The content of a file of JSON.

    Raises:
        RefusedError: as of ``read_object``, but for what it holds.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES >> 20} MiB")
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=single)
    except RecursionError as error:
        raise RefusedError(f"{path} can't be read: its brackets are nested too deeply") from error
    except (OSError, ValueError) as error:
        raise RefusedError(f"{path} can't be read: {error}") from error


def is_unicode(text: str) -> bool:
    """Whether a message can have the text: JSON can spell half of a surrogate pair, which UTF-8 can not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def single(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of its pairs.

    Raises:
        ValueError: a key has two values.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            raise ValueError(f"it says {quoted(key)} twice, with different values")
        found[key] = value
    return found
