"""Commands of the server and its client; ``loadtest.cli`` adds those that measure.

Commands import what is heavy themselves, so that help is instant.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli_backends import backends
from server.cli_generate import generate
from server.cli_models import models
from server.cli_shared import DEFAULT_HOST, DEFAULT_PORT, Host, Port, fail, fail_call, require_server

if TYPE_CHECKING:
    from server.settings import Settings

application = typer.Typer(
    name="longspan",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
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


@application.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False
)
def serve(context: typer.Context) -> None:
    """Serve a model over gRPC."""
    require_server()
    from server.cli_options import command

    command(_serve)(args=context.args, prog_name="longspan serve")


def _serve(settings: Settings) -> int:
    from server.engine.spawn import spawn_engine

    spawned = spawn_engine(settings.threads)
    from server.app import serve  # while the engine process imports torch

    return serve(settings, spawned)


application.command()(generate)
application.command()(backends)


@application.command()
def health(
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the server is ready.")] = False,
    timeout: Annotated[
        float | None,
        typer.Option(min=0.0, help="Seconds to wait. Without it: 5, or with --wait until it is ready."),
    ] = None,
    host: Host = DEFAULT_HOST,
    port: Port = DEFAULT_PORT,
) -> None:
    """End with 0 when the server is ready, else with 1 and the reason."""
    from longspan import Client, LongspanError

    with Client(host, port) as client:
        try:
            if wait:
                client.wait_until_ready(timeout)
            elif not client.health(timeout=5.0 if timeout is None else timeout):
                fail("the server is up but not ready: it loads, drains, or has lost its engine")
        except LongspanError as error:
            fail_call(error)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


application.add_typer(models, name="models")


def main() -> None:
    """Runs the command that the process's arguments name."""
    # gRPC's core writes notes about forks and closed connections to standard error, past any logger. It
    # reads this when it is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    application()


if __name__ == "__main__":
    main()
