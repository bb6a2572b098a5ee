"""``longspan serve``: its command, and the steps before there is an engine process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import typer

from server.cli.help import PlainCommand
from server.cli.shared import fail, require_server, server_is_installed
from server.cli.signals import leave, signals_end

if TYPE_CHECKING:
    from server.settings import Settings


class ServeCommand(PlainCommand):
    """Takes every argument as it is; the options are only for a shell that completes a line."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The options of the settings while a shell completes a line, else none."""
        if not ctx.resilient_parsing or not server_is_installed():
            return super().get_params(ctx)
        from server.cli.options import command

        return typer.main.get_command(command(_serve)).get_params(ctx)


def serve(context: typer.Context) -> None:
    """Serve a model over gRPC."""
    require_server()
    from server.cli.options import command

    command(_serve)(args=context.args, prog_name="longspan serve")


def _serve(settings: Settings) -> NoReturn:
    from server.access.granted import granted
    from server.checks import refusal
    from server.engine.ipc.spawn import spawn_engine
    from server.errors import RefusedError
    from server.ray.refusing import refusal as ray_refusal

    try:
        if sentence := ray_refusal(settings):
            fail(sentence, code=2)
        access = granted(settings)
    except RefusedError as error:
        fail(str(error), code=2)
    if sentence := refusal(settings):
        fail(sentence, code=2)
    if settings.ray:
        leave(_with_ray(settings))
    spawned = spawn_engine(settings.threads, settings.cache_dir)
    signals_end(spawned.end)  # until the server listens, which then handles signals itself
    from server.run import serve  # while the engine process imports torch

    leave(serve(settings, access, spawned))


def _with_ray(settings: Settings) -> int:
    from server.ray.loopback import before_ray

    before_ray()
    try:
        from server.ray.run import serve_with_ray
    except ImportError as error:
        fail(f"--ray: {error.name or error} is not installed; install longspan[ray], or leave it out", code=2)
    return serve_with_ray(settings)
