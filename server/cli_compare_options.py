"""What ``longspan compare`` refuses or answers before it measures: its options, read and checked."""

from __future__ import annotations

import os
from pathlib import Path

import typer

from server.cli_shared import fail

REFUSED = 2
"""Exit code of what is refused before anything is measured."""

_WITH_SHOW = ("show", "preset", "full", "margins", "confidence", "html_file", "csv_folder")


def writable(json_file: Path | None, html_file: Path | None, csv_folder: Path | None) -> None:
    """Refuses before hours of measuring what could not be written after them."""
    for option, path in (("--json", json_file), ("--html", html_file)):
        if path is None:
            continue
        if path.is_dir():
            fail(f"{option} {path} is a folder; name a file", REFUSED)
        if not path.parent.is_dir():
            fail(f"{option} {path}: there is no folder {path.parent}; make it first", REFUSED)
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            fail(f"{option} {path} can't be written; name another file", REFUSED)
    if csv_folder is not None and csv_folder.exists() and not csv_folder.is_dir():
        fail(f"--csv {csv_folder} is a file; name a folder", REFUSED)


def only_shown(context: typer.Context) -> None:
    """Refuses options of measuring beside --show, which would do nothing."""
    given = [
        max(parameter.opts, key=len)
        for parameter in context.command.params
        if parameter.name not in _WITH_SHOW
        and parameter.name is not None
        and (source := context.get_parameter_source(parameter.name)) is not None
        and source.name == "COMMANDLINE"
    ]
    if given or context.args:
        fail(f"--show measures nothing; leave out {' and '.join([*given, *context.args])}", REFUSED)


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
    """Of an option that may be repeated and takes lists."""
    return [word.strip() for text in texts for word in text.split(",")]


def numbers(texts: list[str], option: str) -> list[int]:
    """Whole numbers; those of tokens also as the output writes them: 4k is 4096."""
    found = []
    for word in words(texts):
        thousands = option == "--context" and word.lower().endswith("k")
        digits = word[:-1] if thousands else word
        if not digits.isdecimal() or not int(digits):
            like = "1024,8192 or 1k,8k" if option == "--context" else "1,8"
            fail(f"{option} {word} is no whole number above 0; write it like {like}", REFUSED)
        found.append(int(digits) * (1024 if thousands else 1))
    return found
