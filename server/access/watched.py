"""Files that count as they were last read whole, and are read again once they have changed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from server.errors import RefusedError

log = logging.getLogger("longspan.access")

LOOK_SECONDS = 1.0
"""How often files are looked at."""

Value = TypeVar("Value")
_Stamps = list[tuple[int, int, int, int] | None]


class Watched(Generic[Value]):
    """The content of files. A reading that fails leaves the one before in force, and each look tries again.

    Args:
        files: whose changes count.
        read: reads them; raises ``RefusedError`` where they are not right.
        otherwise: what holds then, for the log, which tells each failure once.

    Attributes:
        value: what the last good reading gave.

    Raises:
        RefusedError: the first reading failed.
    """

    def __init__(self, files: Sequence[Path], read: Callable[[], Value], otherwise: str) -> None:
        self._files, self._read, self._otherwise = files, read, otherwise
        self._told: tuple[_Stamps, str] | None = None
        # Looked at before they are read: what is written meanwhile is another change.
        self._seen = self._stamps()
        self.value = read()

    def look(self) -> bool:
        """Reads the files if they have changed since the last good reading; whether that gave a new value."""
        seen = self._stamps()
        if seen == self._seen:
            return False
        try:
            self.value = self._read()
        except RefusedError as error:
            failure = seen, str(error)
            if failure != self._told:
                self._told = failure
                log.error("%s; %s", error, self._otherwise)
            return False
        self._seen, self._told = seen, None
        return True

    def _stamps(self) -> _Stamps:
        return [_stamp(file) for file in self._files]


def _stamp(file: Path) -> tuple[int, int, int, int] | None:
    """What changes when a file is written or replaced, also behind a link; ``None`` without the file."""
    try:
        found = file.stat()
    except OSError:
        return None
    # Tools may keep a file's time of modification; the kernel alone sets that of its last change.
    return found.st_ctime_ns, found.st_mtime_ns, found.st_size, found.st_ino


def keep_looking(look: Callable[[], object]) -> None:
    """Has a thread of its own call ``look`` every ``LOOK_SECONDS``: a slow disk must hold up no call."""

    def run() -> None:
        while True:
            time.sleep(LOOK_SECONDS)
            try:
                look()
            except Exception:
                log.exception("files of the access could not be looked at")

    threading.Thread(target=run, name="watching files", daemon=True).start()
