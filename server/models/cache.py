"""Files that are made once and kept: locked against other processes, never half-written."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from server.errors import RefusedError

Report = Callable[[str, float | None], None]
"""Told the stage, and how much of it is done (0 to 1), if known."""


def make_once(target: Path, make: Callable[[Path], None], report: Report) -> Path:
    """``target``, made by the first process that needs it while the others wait.

    Args:
        target: a file or folder.
        make: writes the path it is given, which is then moved to ``target`` as a whole. An exception or a
            killed process leaves no ``target``.
        report: told of waiting.

    Raises:
        RefusedError: the folder of ``target`` can't be written.
    """
    if target.exists():
        return target
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(f".{target.name}.lock"), report):
            if not target.exists():
                _remove(partial)
                try:
                    make(partial)
                    os.replace(partial, target)
                finally:
                    _remove(partial)
    except OSError as error:
        raise RefusedError(
            f"{target.parent} can't hold the model ({error}); "
            "make room there or choose another folder with --cache-dir"
        ) from error
    return target


@contextmanager
def _locked(path: Path, report: Report) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another process that prepares the same model", None)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
