"""The flags of ``longspan serve``, made from ``Settings``: names, types, defaults and help in one place."""

from __future__ import annotations

import difflib
import functools
import inspect
import os
import tomllib
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined
from pydantic_settings import SettingsError

from server.cli.connection import VARIABLES
from server.cli.help import PlainCommand
from server.cli.other_servers import called_here, positional
from server.cli.shared import fail
from server.cli.variables import stray
from server.setting_types import Bytes, File, Options, Protocols
from server.settings import Settings

_CONFIG_VARIABLE = "LONGSPAN_CONFIG"
_DEFAULT_CONFIG = "longspan.toml"


# Titles in the help, each above the settings from this one to the next that is named here.
_PANELS = {
    "model": "Model",
    "host": "Network",
    "tls_certificate": "Access",
    "ray": "Ray Serve",
    "attention": "Attention",
    "kv_dtype": "Memory of the KV cache",
    "speculate": "Speculation",
    "max_batch_tokens": "Limits",
    "threads": "Engine",
    "measure_device": "Observability",
}


class SettingsRefusedError(Exception):
    """Settings that can't be used; the message has one sentence a line, each with the flag at fault."""


def flag(name: str) -> str:
    """``max_batch_tokens`` to ``--max-batch-tokens``."""
    return "--" + name.replace("_", "-")


def variable(name: str) -> str:
    """``port`` to ``LONGSPAN_PORT``."""
    return f"{Settings.model_config['env_prefix']}{name}".upper()


def load(given: dict[str, Any], config: Path | None = None) -> Settings:
    """Settings from flags, environment and file, in this order of precedence.

    Args:
        given: flags that were given, by field name, as text.
        config: the TOML file; without it ``$LONGSPAN_CONFIG``, or ``longspan.toml`` where there is one.

    Raises:
        SettingsRefusedError: a value is wrong, or a file that was named is not there or not TOML.
    """
    if config is not None:
        os.environ[_CONFIG_VARIABLE] = str(config)
    refusals, _ = stray_variables()
    if refusals:
        raise SettingsRefusedError("\n".join(refusals))
    file = os.environ.get(_CONFIG_VARIABLE) or _DEFAULT_CONFIG
    if file != _DEFAULT_CONFIG and not Path(file).is_file():
        source = "--config" if config is not None else f"${_CONFIG_VARIABLE}"
        raise SettingsRefusedError(f"{source}: there is no file {file}.")
    try:
        return Settings(**given)
    except ValidationError as error:
        lines = [_sentence(details, given, file) for details in error.errors(include_url=False)]
        raise SettingsRefusedError("\n".join(dict.fromkeys(lines))) from None
    except SettingsError as error:  # a dictionary in the environment that is not JSON
        raise SettingsRefusedError(
            f'{error}. Dictionaries in the environment are JSON, like {{"window": "512"}}.'
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsRefusedError(f"{file} is not valid TOML: {error}.") from None


def stray_variables() -> tuple[list[str], list[str]]:
    """As ``server.cli.variables.stray``, of this process and the settings."""
    # Those of the commands that talk to a server may be set beside it, as for a container's health check.
    known = [_CONFIG_VARIABLE, *map(variable, Settings.model_fields), *VARIABLES]
    return stray(os.environ, Settings.model_config["env_prefix"], known)


def _sentence(details: ErrorDetails, given: dict[str, Any], file: str) -> str:
    """The error of one setting, under the name that it was given by."""
    name = str(details["loc"][0]) if details["loc"] else ""
    if details["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, Settings.model_fields, n=1)
        return f"{file}: there is no setting {name!r}{f'; did you mean {near[0]!r}?' if near else '.'}"
    message = details["msg"].removeprefix("Value error, ").removeprefix("Input ").partition(", unable to ")[0]
    message = message.replace("a valid boolean", "true or false")
    value = "" if details["type"] == "value_error" else f", not {details['input']!r}"
    if name in given:
        source = flag(name)
    elif variable(name) in os.environ:
        source = f"${variable(name)}"
    else:
        source = f"{file}: {name}"
    return f"{source}: {message}{value}."


def command(run: Callable[[Settings], int]) -> typer.Typer:
    """An application of one command, which takes every setting as a flag and exits with what ``run`` returns.

    Flags stay text: only ``Settings`` converts and checks, wherever a value comes from.
    """

    def serve(context: typer.Context, config: Path | None, **values: Any) -> None:
        given = {
            name: value
            for name, value in values.items()
            if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
        }
        try:
            settings = load(given, config)
            _, warnings = stray_variables()
            for warning in warnings:
                typer.echo(f"longspan: {warning}", err=True)
        except SettingsRefusedError as error:
            fail(str(error).replace("\n", "\nlongspan: "), code=2)
        raise typer.Exit(run(settings))

    config = typer.Option(
        "--config",
        metavar="PATH",
        show_default=_DEFAULT_CONFIG,
        help=f"TOML file with settings, by their names with underscores. Environment: ${_CONFIG_VARIABLE}.",
    )
    kind = inspect.Parameter.KEYWORD_ONLY
    panels = _panels()
    parameters = [
        inspect.Parameter("context", kind, annotation=typer.Context),
        inspect.Parameter("config", kind, default=None, annotation=Annotated[Path | None, config]),
        *(
            inspect.Parameter(
                name, kind, default=_default(field), annotation=_annotation(name, field, panels[name])
            )
            for name, field in Settings.model_fields.items()
        ),
    ]
    serve.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    serve.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    serve.__doc__ = (
        "Serve a model over gRPC.\n\n"
        "Flags go before environment variables, those before the TOML file, and that before the defaults."
    )
    application = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    application.command("serve", cls=_Command)(serve)
    return application


class _Command(PlainCommand):
    """Translates other servers' flags, before click calls them unknown."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if sentence := called_here(args):
            ctx.fail(sentence)
        return super().parse_args(ctx, args)

    def too_many(self, arguments: list[str]) -> str:
        return positional(arguments)


def _panels() -> dict[str, str]:
    """The title above each setting."""
    titles, title = {}, ""
    for name in Settings.model_fields:
        titles[name] = title = _PANELS.get(name, title)
    return titles


def _annotation(name: str, field: FieldInfo, panel: str) -> Any:
    """The option of one setting, as typer reads it from an annotation."""
    kind = _kind(name)
    # typer shows the variable in the help; its value is left to Settings, which knows how to read it
    shared: dict[str, Any] = {
        "envvar": variable(name),
        "help": field.description,
        "rich_help_panel": panel,
    }
    if kind is bool:
        # click would read a boolean's variable itself, with a sentence of its own where it is wrong.
        shared["help"] = f"{field.description} Environment: ${shared.pop('envvar')}."
        shared["show_default"] = "on" if field.default else "off"
        return Annotated[bool | None, typer.Option(f"{flag(name)}/{flag('no_' + name)}", **shared)]
    if typing.get_origin(kind) is typing.Literal:
        shared["autocompletion"] = lambda: list(typing.get_args(kind))
    option = typer.Option(flag(name), metavar=_metavar(kind), **shared)
    return Annotated[list[str] | None if kind is Options else str | None, option]


def _kind(name: str) -> Any:
    """A setting's type without ``None``, with its validators: as it is written in ``Settings``."""
    kind = _kinds()[name]
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        (kind,) = (member for member in typing.get_args(kind) if member is not type(None))
    return kind


@functools.cache
def _kinds() -> dict[str, Any]:
    return typing.get_type_hints(Settings, include_extras=True)


def _metavar(kind: Any) -> str:
    """The help's placeholder for a value."""
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(typing.get_args(kind))
    names = {Options: "KEY=VALUE", Bytes: "SIZE", Protocols: "NAME,..."}
    names |= {int: "INTEGER", float: "NUMBER", str: "TEXT"}
    return "PATH" if kind in (File, Path) else names[kind]


def _default(field: FieldInfo) -> str | bool | None:
    """A setting's default for the help; where there is none, the description says what applies."""
    if isinstance(field.default, bool):
        return field.default
    return None if field.default in (None, PydanticUndefined) else str(field.default)
