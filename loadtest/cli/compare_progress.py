"""Tells how far a comparison is: on the terminal, in its file, and on a page."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.status import Status
from rich.text import Text

from loadtest.compare import document
from loadtest.compare.estimate import minutes
from loadtest.compare.group import Listener
from loadtest.compare.types import Comparison, Judgment, Outcome

if TYPE_CHECKING:
    from loadtest.report.compare import Progress
    from loadtest.report.live import Live

_SAVE_SECONDS = 10.0
_SHOW_SECONDS = 2.0
_LINE_SECONDS = 15.0  # between lines where there is no terminal


class Watcher:
    """The progress of a comparison that runs: shown, and kept in its file.

    Args:
        budget: seconds.
        file: kept up to date with what was measured; ``None`` for none.
        live: the report is served on a port of this machine while it lasts.
        clock: in seconds.

    Attributes:
        listener: for ``loadtest.compare.run``.
    """

    def __init__(
        self, budget: float, file: Path | None, live: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._budget, self._file, self._clock = budget, file, clock
        self._console = Console(stderr=True)
        self._status = Status("", console=self._console) if self._console.is_terminal else None
        self._live: Live | None = None
        if live:
            from loadtest.report.live import Live

            self._live = Live()
        self._comparison: Comparison | None = None
        self._judgment: Judgment | None = None
        self._began = clock()
        self._saved = self._shown = self._told = float("-inf")
        self._doing = self._unsaved = ""
        self._stamp: tuple[int, int] | None = None
        self.listener = Listener(self.doing, self._judged)

    def __enter__(self) -> Watcher:
        if self._live is not None:
            self._console.print(f"the report while it grows: {self._live.address}")
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()
        if self._live is not None:
            if self._comparison is not None and self._judgment is not None:
                self._live.end(self._comparison, self._judgment)
            self._live.close()

    def watch(self, comparison: Comparison) -> None:
        """Sets the comparison that is measured from now on, which contains the rows of its file."""
        self._comparison = comparison
        self._stamp = None if self._file is None else _stamp(self._file)

    def doing(self, words: str) -> None:
        """Shows the current activity."""
        self._doing = words
        if self._live is not None and self._judgment is not None:
            self._live.progress(self._progress())
        now = self._clock()
        if self._status is not None:
            self._status.update(Text(self._line(), overflow="ellipsis", no_wrap=True))
        elif now - self._told >= _LINE_SECONDS:
            self._told = now
            self._print(self._line())

    def say(self, words: str) -> None:
        """Shows a line of information before it begins."""
        self._print(words, whole=not self._console.is_terminal)  # lines in a file are not wrapped

    def keep(self) -> str:
        """Saves the results so far.

        Returns:
            Why it could not be saved; empty if it was. A full disk ends no run: it may have room later.
        """
        if self._file is None or self._comparison is None:
            return ""
        self._saved = self._clock()
        if _stamp(self._file) != self._stamp:
            mine = self._file.with_name(f"{self._file.stem}.{os.getpid()}{self._file.suffix}")
            self._print(f"another run writes {self._file}; what this one measures is kept in {mine}")
            self._file = mine
        try:
            document.save(self._comparison, self._file)
        except OSError as error:
            return f"{self._file} can't be written: {error.strerror or error}"
        self._stamp = _stamp(self._file)
        return ""

    def _judged(self, judgment: Judgment) -> None:
        self._judgment = judgment
        now = self._clock()
        if now - self._saved >= _SAVE_SECONDS and (why := self.keep()) != self._unsaved:
            self._unsaved = why
            self._print(f"{why}; it is tried again" if why else f"{self._file} is written again")
        if self._live is not None and self._comparison is not None and now - self._shown >= _SHOW_SECONDS:
            self._live.update(self._comparison, judgment, self._progress())
            self._shown = now

    def _progress(self) -> Progress:
        from loadtest.report.compare import Progress

        spent = self._clock() - self._began
        return Progress(self._doing, min(1.0, spent / self._budget), max(0.0, self._budget - spent))

    def _print(self, words: str, whole: bool = True) -> None:
        self._console.print(words, style="dim", markup=False, highlight=False, soft_wrap=whole)

    def _line(self) -> str:
        left = max(0.0, self._budget - (self._clock() - self._began))
        line = f"at most {minutes(left)} left of {minutes(self._budget)}: {self._doing}"
        if self._judgment is None or self._comparison is None:
            return line
        failed = self._comparison.failed
        verdicts = [one for one in self._judgment.verdicts if one.deployment not in failed]
        unknown = sum(one.outcome is Outcome.UNKNOWN for one in verdicts)
        return f"{line}; quality open for {unknown} of {len(verdicts)}" if unknown else line


def _stamp(file: Path) -> tuple[int, int] | None:
    """A file's state, to detect changes; ``None`` where there is no file."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns
