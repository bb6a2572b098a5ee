"""Refusals of the commands that measure, before they begin."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path

import typer

from server.cli.shared import fail


def writable(files: Mapping[str, Path | None], csv_folder: Path | None = None, code: int = 1) -> None:
    """Refuses files, by option, that can't be written, before hours of measuring."""
    from loadtest.document import refusal

    for option, path in files.items():
        if path is None:
            continue
        if not path.parent.is_dir():
            fail(f"{option} {path}: there is no folder {path.parent}; make it first", code)
        if sentence := refusal(path):
            fail(f"{option}: {sentence}", code)
    if csv_folder is not None:
        if csv_folder.exists() and not csv_folder.is_dir():
            fail(f"--csv {csv_folder} is a file; name a folder", code)
        if sentence := refusal(csv_folder, folder=True):
            fail(f"--csv: {sentence}", code)


def only_shown(context: typer.Context, with_show: Collection[str], code: int = 1) -> None:
    """Refuses options of measuring beside --show, which would do nothing.

    Args:
        context: of the command.
        with_show: names of the parameters that --show heeds.
        code: exit code.
    """
    given = [
        max(parameter.opts, key=len)
        for parameter in context.command.params
        if parameter.name is not None
        and parameter.name not in with_show
        and (source := context.get_parameter_source(parameter.name)) is not None
        and source.name == "COMMANDLINE"
    ]
    if given or context.args:
        fail(f"--show measures nothing; leave out {' and '.join([*given, *context.args])}", code)


def require_numpy() -> None:
    """Ends the command unless intervals across runs can be computed."""
    if not find_spec("numpy"):
        fail("intervals across --repeats need numpy; run: pip install 'longspan[load]'")


def require_templates(option: str = "--html") -> None:
    """Ends the command unless reports and drawings can be written."""
    if not find_spec("jinja2"):
        fail(f"{option} needs jinja2; run: pip install 'longspan[load]'")
