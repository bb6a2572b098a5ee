"""GGUF files, converted once into the cache and found again by their content."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from server.errors import RefusedError
from server.models.cache import Report, make_once
from server.models.conversions import ConversionError, run_conversion
from server.models.gguf.parts import find_parts
from server.models.sampled import sampled_digest

log = logging.getLogger("longspan.models")

RECORD = "longspan.json"
"""File in a converted folder that says where it comes from."""

# Raised when conversion changes, so that folders of older versions are made again.
_SUFFIX = "-v3"
_CHUNK = 1 << 20
_NAME = 150


def models_folder(cache_dir: Path) -> Path:
    """Where converted models lie."""
    return cache_dir / "models"


def convert_once(file: Path, name: str, source: str, cache_dir: Path, report: Report) -> Path:
    """The Hugging Face folder of a GGUF file.

    The folder's ``longspan.json`` keeps ``name``, ``source``, the path of the file (``gguf``), its
    ``size``, ``mtime_ns``, ``sampled`` digests and ``sha256``; of a split set, the first file's path, and the
    others of all files together; and the sizes of what was written (``files``). A file whose path, size, time
    and samples are recorded is not read as a whole again.

    Args:
        file: the GGUF file, or any part of a split set.
        name: the model's name in requests.
        source: where it came from, for people.
        cache_dir: of the settings.
        report: told the progress.

    Raises:
        RefusedError: the file is none that can be converted, or the cache can't be written.
    """
    file = Path(os.path.abspath(file))
    try:
        parts = find_parts(file)
    except ValueError as error:
        raise RefusedError(f"{file.name} can't be read: {error}") from error
    for part in parts:
        if not is_gguf(part):
            raise RefusedError(f"{part} is no GGUF file; fetch it again, or name a Hugging Face folder")
    file, states = parts[0], [part.stat() for part in parts]
    record = {
        "gguf": str(file),
        "size": sum(state.st_size for state in states),
        # Of a split set, those of all parts: the number changes with any part.
        "mtime_ns": sum(state.st_mtime_ns for state in states),
        "sampled": [sampled_digest(part) for part in parts],
    }
    for folder in converted(cache_dir):
        if record.items() <= read_record(folder).items():
            return _whole(folder)

    digest = hashlib.sha256()
    for part in parts:
        report(f"reading {part.name}", None)
        with part.open("rb") as opened:
            while chunk := opened.read(_CHUNK):
                digest.update(chunk)
    sha256 = digest.hexdigest()
    record |= {"sha256": sha256, "name": name, "source": source}
    # Cut where names of folders could become too long.
    same = f"{name.encode()[:_NAME].decode(errors='ignore')}-{sha256[:12]}-v"
    target = models_folder(cache_dir) / f"{same.removesuffix('-v')}{_SUFFIX}"

    def make(partial: Path) -> None:
        _convert(file, partial, report)
        files = {path.name: path.stat().st_size for path in partial.iterdir()}
        (partial / RECORD).write_text(json.dumps({**record, "files": files}, indent=2))

    make_once(target, make, report)
    for other in models_folder(cache_dir).iterdir():
        if other.is_dir() and other.name.startswith(same) and other != target:
            # Not deleted: a server of that version may still need it.
            log.info("%s is of another version of Longspan; delete it if that is not used any more", other)
    if not record.items() <= read_record(target).items():
        moved = target / f".{RECORD}.partial"
        try:
            moved.write_text(json.dumps({**read_record(target), **record}, indent=2))
            moved.replace(target / RECORD)
        except OSError as error:
            log.warning("%s is read as a whole at every start: its place can't be noted (%s)", file, error)
    return _whole(target)


def _whole(folder: Path) -> Path:
    """The folder, if it still has what was written: nothing else would say that it can be made again."""
    for name, size in dict(read_record(folder).get("files", {})).items():
        path = folder / name
        if not path.is_file() or (path.suffix == ".safetensors" and path.stat().st_size != size):
            raise RefusedError(f"{path} is missing or damaged; delete {folder}, and it will be made again")
    return folder


def is_gguf(file: Path) -> bool:
    """Whether the file begins as GGUF files do, whatever its name."""
    with file.open("rb") as opened:
        return opened.read(4) == b"GGUF"


def converted(cache_dir: Path) -> list[Path]:
    """All folders that this version converted, in order of their names."""
    return sorted(record.parent for record in models_folder(cache_dir).glob(f"*{_SUFFIX}/{RECORD}"))


def read_record(folder: Path) -> dict[str, Any]:
    """The content of a converted folder's ``longspan.json``; empty where it can't be read."""
    try:
        content = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _convert(file: Path, folder: Path, report: Report) -> None:
    def told(line: str) -> None:
        fraction, _, stage = line.partition(" ")
        report(f"converting {file.name}: {stage}", float(fraction))

    try:
        run_conversion("server.models.gguf", file, folder, told)
    except ConversionError as error:
        raise RefusedError(
            f"{file.name} can't be converted: {error}; use the model's Hugging Face folder or hub name "
            "instead"
        ) from error
