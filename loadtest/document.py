"""JSON documents of measurements: written atomically, read with a sentence for every fault.

Non-finite numbers, which JSON lacks, become null.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any


class DocumentError(ValueError):
    """A file is not a document of the wanted schema; the message says what it is and what to do."""


def machine() -> dict[str, Any]:
    """The machine of this process: ``cpu``, ``cores`` that it may use, ``memory_bytes``, ``system``."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = (line for line in cpuinfo.read_text().splitlines() if line.startswith("model name"))
        cpu = next(names, cpu).partition(":")[2].strip() or cpu
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(terse=True),
    }


def cores_of(machine: Mapping[str, Any]) -> str:
    """``2 cores of NAME``, of what ``machine`` gave."""
    cores = machine.get("cores", "?")
    return f"{cores} {'core' if cores == 1 else 'cores'} of {machine.get('cpu', 'an unknown processor')}"


def versions(*packages: str) -> dict[str, str]:
    """The versions of installed distributions, by name."""
    return {package: version(package) for package in packages}


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it: dataclasses and mappings as objects, tuples as lists.

    NaN and infinities become ``None``.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def save(document: Mapping[str, Any], path: Path) -> None:
    """Writes a document in one go: an interrupted run leaves the last whole one.

    Args:
        document: with its ``schema``, a name and a version like ``longspan-load/1``; ``plain`` is applied.
        path: replaced if it exists.

    Raises:
        ValueError: the document has no schema, so that ``read`` could not know it.
        OSError: the file can't be written.
    """
    if not isinstance(document.get("schema"), str):
        raise ValueError("a document needs a schema")
    text = json.dumps(plain(document), indent=1, allow_nan=False, ensure_ascii=False)
    write(text + "\n", path)


def write(text: str, path: Path) -> None:
    """Writes a file in one go: where that fails, what was there before stays whole.

    Raises:
        OSError: it can't be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        temporary.write_text(text, encoding="utf-8", newline="")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def refusal(path: Path, folder: bool = False) -> str:
    """Why a file can't be written there, checked before hours of measuring; empty if it can.

    Args:
        path: of a file that ``save`` or the like would write, which is tried beside it.
        folder: it is to be a folder with files instead; those that are missing are made.
    """
    try:
        if folder:
            path.mkdir(parents=True, exist_ok=True)
        elif path.is_dir():
            return f"{path} is a folder; name a file"
        str(path).encode()
        with tempfile.TemporaryFile(dir=path if folder else path.parent):
            pass
        if path.is_file() and not os.access(path, os.W_OK):
            return f"{path} can't be written: it is read-only"
    except (OSError, ValueError) as error:
        return f"{path} can't be written: {getattr(error, 'strerror', None) or error}; name another place"
    return ""


def read(path: Path, schema: str) -> dict[str, Any]:
    """A document without its ``schema``.

    Args:
        path: of the file.
        schema: that it must have.

    Raises:
        DocumentError: it can't be read, or is of another schema.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DocumentError(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"{path} can't be read as JSON: {error}") from error
    found = document.pop("schema", None) if isinstance(document, dict) else None
    if found == schema:
        return dict(document)
    if isinstance(found, str) and found.partition("/")[0] == schema.partition("/")[0]:
        raise DocumentError(
            f"{path} is of schema {found}, which this version of Longspan doesn't read ({schema} it does); "
            "measure again, or name another file"
        )
    raise DocumentError(f"{path} is not a {schema.partition('/')[0]} document ({schema}); name another file")
