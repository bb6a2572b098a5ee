"""A bar on standard error for what takes long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar, where standard error is a terminal; else nothing.

    Yields:
        To be called with a stage in a few words, how much of it is done, and how much it has; 0 if unknown. A
        stage begins with nothing done.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def tell(stage: str, done: int, total: int) -> None:
            if done == 0:
                bar.reset(task, total=total or None)
            bar.update(task, description=stage, completed=done, total=total or None)

        yield tell
