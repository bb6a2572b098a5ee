"""Commands of the server and its client; ``loadtest.cli`` adds those that measure.

Commands import heavy modules themselves, so that help is instant.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

from server.cli.backends import backends
from server.cli.embed import embed
from server.cli.fill import fill
from server.cli.generate import generate
from server.cli.health import health
from server.cli.help import PlainCommand
from server.cli.models import models
from server.cli.read import read
from server.cli.serve import ServeCommand, serve
from server.cli.token import token

application = typer.Typer(
    name="longspan",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables cut names off where a terminal has 80 columns
    help="Serve Transformer models over gRPC, and talk to them.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("longspan"))
        raise typer.Exit


@application.callback()
def _longspan(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    pass


application.command(
    cls=ServeCommand,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)(serve)
application.command(cls=PlainCommand)(generate)
application.command(cls=PlainCommand)(read)
application.command(cls=PlainCommand)(embed)
application.command(cls=PlainCommand)(fill)
application.command(cls=PlainCommand)(backends)
application.command(cls=PlainCommand)(health)
application.command(cls=PlainCommand)(token)
application.add_typer(models, name="models")


def run() -> None:
    """Runs the command that the process's arguments name."""
    # gRPC's core writes notes about forks and closed connections to standard error, past any logger. It
    # reads this when it is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    application()
