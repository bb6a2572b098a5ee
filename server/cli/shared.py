"""Shared by the commands: the server's address, and how errors end a command."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, NoReturn

import typer

from server.cli.terminal import shown

if TYPE_CHECKING:
    from longspan import LongspanError

# The client's own defaults, without its import: grpc takes a fifth of a second.
DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 50051

_OF_SERVER = ("pydantic_settings", "msgspec", "torch", "transformers")

UNBROKEN = 1000  # columns: each row of a table on one line, so that programs can read it and paths be copied


def fail(sentence: str, code: int = 1) -> NoReturn:
    """Ends the command with a sentence on standard error.

    Raises:
        typer.Exit: always.
    """
    typer.echo(f"longspan: {shown(sentence, sys.stderr)}", err=True)
    raise typer.Exit(code)


def fail_call(error: LongspanError) -> NoReturn:
    """Ends the command with a failed call's message, and the fields at fault.

    Raises:
        typer.Exit: always, with 1.
    """
    fields = [
        f"\n  {violation}" for violation in error.violations if violation.description not in error.message
    ]
    fail(error.message + "".join(fields))


def server_is_installed() -> bool:
    """Whether the server's dependencies are installed."""
    return all(map(find_spec, _OF_SERVER))


def require_server() -> None:
    """Ends the command unless the server's dependencies are installed.

    Raises:
        typer.Exit: they are not, with 1.
    """
    if missing := [name for name in _OF_SERVER if not find_spec(name)]:
        fail(
            f"this command needs {', '.join(missing)}, which the client alone does not install; "
            "run: pip install 'longspan[server]'"
        )
