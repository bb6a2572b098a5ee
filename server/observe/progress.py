"""Progress of a start, for people: a bar on a terminal, lines in the log elsewhere."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

log = logging.getLogger("longspan.start")


class StartProgress:
    """Shows one stage at a time. Methods may be called from any thread.

    Args:
        tell: also told, as part of a sentence such as ``"loading weights, 40%"``.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._lock = threading.Lock()
        self._stage = ""
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if sys.stderr.isatty():
            self._bar = _bar()
            self._bar.start()

    def report(self, stage: str, fraction: float | None) -> None:
        """``stage`` is under way, and this share of it is done, if known."""
        with self._lock:
            self._tell(stage if fraction is None else f"{stage}, {fraction:.0%}")
            new = stage != self._stage
            self._stage = stage
            if self._bar is None:
                if new:
                    log.info("%s", stage)
                return
            if new and self._task is not None:
                self._bar.remove_task(self._task)
            if new or self._task is None:
                self._task = self._bar.add_task(stage, total=None)
            if fraction is not None:
                self._bar.update(self._task, total=1.0, completed=fraction)

    def close(self) -> None:
        """Takes the bar off the terminal."""
        with self._lock:
            if self._bar is not None:
                self._bar.stop()
                self._bar = None


def _bar() -> Progress:
    from rich.console import Console  # which a server without a terminal does without
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
