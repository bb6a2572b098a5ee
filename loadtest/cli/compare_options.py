"""Options of ``longspan compare``: how they are read, and the list of tasks."""

from __future__ import annotations

from server.cli.shared import fail

REFUSED = 2
"""Exit code of what is refused before anything is measured."""


def list_tasks() -> None:
    """Prints what --task takes."""
    from rich.console import Console
    from rich.table import Table

    from loadtest.tasks.registry import TASKS

    grid = Table(box=None, pad_edge=False)
    for column in ("task", "asks for", "source"):
        grid.add_column(column)
    for task in TASKS.values():
        grid.add_row(task.name, task.description, task.source)
    Console().print(grid)


def words(texts: list[str]) -> list[str]:
    """Values of an option that may be repeated and takes lists."""
    return [word.strip() for text in texts for word in text.split(",")]


def numbers(texts: list[str], option: str) -> list[int]:
    """Whole numbers; those of tokens also as the output writes them: 4k is 4096."""
    found = []
    for word in words(texts):
        thousands = option == "--context" and word.lower().endswith("k")
        digits = word[:-1] if thousands else word
        if not digits.isdecimal() or not int(digits):
            like = "1024,8192 or 1k,8k" if option == "--context" else "1,8"
            fail(f"{option} {word} is not a whole number above 0; write it like {like}", REFUSED)
        found.append(int(digits) * (1024 if thousands else 1))
    return found
