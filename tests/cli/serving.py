"""A command line of ``longspan serve``, and what comes of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli.options import command
from server.settings import Settings


class Outcome:
    """The outcome of a command line."""

    def __init__(self, arguments: list[str], environment: dict[str, str] | None = None) -> None:
        self.settings: Settings | None = None
        result = CliRunner().invoke(command(self._keep), arguments, env=environment or {})
        self.code, self.output, self.error = result.exit_code, result.stdout, result.stderr

    def _keep(self, settings: Settings) -> int:
        self.settings = settings
        return 7


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("LONGSPAN_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LONGSPAN_CONFIG", "")  # restored afterwards, as --config sets it
    monkeypatch.setenv("COLUMNS", "200")
