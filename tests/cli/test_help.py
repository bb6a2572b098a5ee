"""Help and completion: in a terminal of 80 columns every name can be read and copied whole."""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from loadtest.cli.application import application
from server.cli.options import command
from tests.command import longspan

LONGSPAN = str(Path(sys.executable).parent / "longspan")


@pytest.fixture(autouse=True)
def _interrupt() -> Iterator[None]:
    """The command of a server ends its process at once on Ctrl-C; it is this one here."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@functools.cache
def commands() -> dict[str, Any]:
    """Every command by the words that call it, with the options that its help must show."""
    root = typer.main.get_command(application)
    found: dict[str, Any] = {}

    def add(words: str, entry: Any) -> None:
        for name, child in getattr(entry, "commands", {}).items():
            add(f"{words} {name}".strip(), child)
        if not getattr(entry, "commands", {}):
            found[words] = entry

    add("", root)
    found["serve"] = typer.main.get_command(command(lambda settings: 0))
    return found


@pytest.mark.parametrize("words", list(commands()))
def test_names_are_whole_in_80_columns(words: str) -> None:
    shown = CliRunner().invoke(application, [*words.split(), "--help"], env={"COLUMNS": "80"})
    assert shown.exit_code == 0, shown.output
    assert max(map(len, shown.output.splitlines())) <= 80
    assert "…" not in shown.output
    assert re.search(r"<(str|int|float|path|list)\b", shown.output) is None
    assert "\u2011" not in shown.output, "copied, it would be no hyphen"
    whole = set(shown.output.replace("[", " ").split())
    options = [name for each in commands()[words].params for name in (*each.opts, *each.secondary_opts)]
    assert [name for name in options if name.startswith("-") and name not in whole] == []
    # No line ends within a name that another begins: --kv-memory- and share.
    assert [line for line in shown.output.splitlines() if line.rstrip().endswith("-")] == []


@pytest.mark.parametrize("words", ["", "models"])
def test_summaries_of_commands_are_whole(words: str) -> None:
    shown = CliRunner().invoke(application, [*words.split(), "--help"], env={"COLUMNS": "80"})
    (_, listed) = shown.output.split("Commands:")
    assert all(line.endswith(".") and "..." not in line for line in listed.strip().splitlines()), listed


def completed(line: str, word: int) -> list[str]:
    environment = {"_LONGSPAN_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(word)}
    done = longspan(environment=environment)
    assert done.stderr == ""
    return done.stdout.split()


def test_a_shell_completes_commands_flags_and_values() -> None:
    assert completed("longspan s", 1) == ["serve"]
    assert completed("longspan serve --kv-m", 2) == ["--kv-memory", "--kv-memory-share"]
    assert completed("longspan serve --kv-dtype flo", 3) == ["float32", "float16", "float8_e4m3"]
    assert completed("longspan generate --max-t", 2) == ["--max-tokens"]


def test_the_script_for_a_shell_is_printed() -> None:
    done = subprocess.run([LONGSPAN, "--show-completion", "bash"], capture_output=True, text=True, timeout=60)
    if done.returncode:  # the shell is found out, not given
        environment = os.environ | {"SHELL": "/bin/bash"}
        shell = ["bash", "-c", f"{LONGSPAN} --show-completion; true"]
        done = subprocess.run(shell, capture_output=True, text=True, timeout=60, env=environment)
    assert "_LONGSPAN_COMPLETE=complete_bash" in done.stdout, done.stderr
