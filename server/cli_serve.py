"""``longspan serve``: its command, and what happens before there is an engine process."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import typer

from server.cli_help import PlainCommand
from server.cli_shared import fail, require_server, server_is_installed

if TYPE_CHECKING:
    from server.engine.spawn import Spawned
    from server.settings import Settings

_INTERRUPTED = 130


class ServeCommand(PlainCommand):
    """Takes every argument as it is; only a shell that completes a line is told the options."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The options of the settings while a shell completes a line, else none."""
        if not ctx.resilient_parsing or not server_is_installed():
            return super().get_params(ctx)
        from server.cli_options import command

        return typer.main.get_command(command(_serve)).get_params(ctx)


def serve(context: typer.Context) -> None:
    """Serve a model over gRPC."""
    _end_at_once_on_ctrl_c(None)
    require_server()
    from server.cli_options import command

    command(_serve)(args=context.args, prog_name="longspan serve")


def _serve(settings: Settings) -> int:
    from server.attention_check import ask
    from server.engine.spawn import spawn_engine

    if sentence := ask(settings):
        fail(sentence, code=2)
    spawned = spawn_engine(settings.threads, settings.cache_dir)
    _end_at_once_on_ctrl_c(spawned)
    from server.app import serve  # while the engine process imports torch

    return serve(settings, spawned)


def _end_at_once_on_ctrl_c(spawned: Spawned | None) -> None:
    """Until the server listens and drains, there is nothing to wait for and no place to tell of.

    An exception would come up anywhere in the seconds of imports, with a traceback.
    """
    if threading.current_thread() is not threading.main_thread():
        return

    def end(*_: object) -> None:
        if spawned is not None:
            spawned.kill()
        os._exit(_INTERRUPTED)

    signal.signal(signal.SIGINT, end)
