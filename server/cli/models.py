"""``longspan models``: what is in the local cache, and how to get more into it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.cli.help import PlainCommand
from server.cli.shared import UNBROKEN, fail, require_server
from server.cli.signals import INTERRUPTED, interrupts_raise

models = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Models on this machine.")

CacheDir = Annotated[
    Path | None,
    typer.Option(help="Where converted models are kept. Without it: the setting of `longspan serve`."),
]


@models.command("list", cls=PlainCommand)
def list_models(cache_dir: CacheDir = None) -> None:
    """List the models on this machine."""
    require_server()
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table
    from rich.text import Text

    from server.models.resolve import list_cached

    folder = _cache_dir(cache_dir)
    found = list_cached(folder)
    if not found:
        typer.echo(f"There are no models in {folder}; get the default one: longspan models pull", err=True)
        return
    table = Table("Model", "Size", "Source", "Folder", box=None)
    table.columns[1].justify = "right"
    for model in found:
        table.add_row(Text(model.name), decimal(model.size), Text(model.source), Text(str(model.folder)))
    Console(width=UNBROKEN).print(table)


@models.command("pull", cls=PlainCommand)
def pull_model(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Hub name, GGUF file, minilm (a small encoder) or annalog (a small encoder-decoder). "
            "Without it: the default model.",
            show_default=False,
        ),
    ] = None,
    cache_dir: CacheDir = None,
) -> None:
    """Fetch a model and convert it where needed.

    Serving it then starts at once.
    """
    require_server()
    from server.errors import RefusedError
    from server.models.resolve import resolve_model
    from server.observe.progress import StartProgress

    interrupts_raise()  # so that the progress line is closed
    progress = StartProgress(lambda _: None)
    try:
        files = resolve_model(model, _cache_dir(cache_dir), progress.report)
    except RefusedError as error:
        progress.close()
        fail(str(error))
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    finally:
        progress.close()
    typer.echo(files.folder)


def _cache_dir(given: Path | None) -> Path:
    """The folder given, else that of the settings."""
    from server.cli.options import SettingsRefusedError, load

    try:
        return load({} if given is None else {"cache_dir": given}).cache_dir
    except SettingsRefusedError as error:
        fail(str(error), code=2)
