"""A command line of ``longspan serve``, and what comes of it."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from server.cli.options import command
from server.settings import Settings

_kept: list[Settings] = []


def _keep(settings: Settings) -> int:
    _kept.append(settings)
    return 7


@functools.cache
def _serve() -> Any:
    """The command; making one of some hundred options takes most of the time of running it."""
    return typer.main.get_command(command(_keep))


class Outcome:
    """The outcome of a command line."""

    def __init__(self, arguments: list[str], environment: dict[str, str] | None = None) -> None:
        _kept.clear()
        self.code: object = 0
        with CliRunner().isolation(env=environment or {}) as (output, error, _):
            try:
                _serve().main(arguments, prog_name="serve")
            except SystemExit as end:
                self.code = end.code
            sys.stdout.flush()
            sys.stderr.flush()
            self.output, self.error = output.getvalue().decode(), error.getvalue().decode()
        self.settings = _kept[0] if _kept else None


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("LONGSPAN_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LONGSPAN_CONFIG", "")  # restored afterwards, as --config sets it
    monkeypatch.setenv("COLUMNS", "200")
