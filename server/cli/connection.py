"""The options of every command that talks to a server: where it is, and how to reach it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, cast, get_type_hints

import typer

from server.cli.shared import DEFAULT_HOST, DEFAULT_PORT, fail

if TYPE_CHECKING:
    from longspan import AsyncClient, Client, ConnectOptions


class Connection(NamedTuple):
    """The connection that the options say.

    Attributes:
        host: name, address or target of the server.
        port: of its gRPC service.
        options: those that were given.
    """

    host: str
    port: int
    options: ConnectOptions

    def client(self, timeout: float | None = None) -> Client:
        """A client; a mistake in the options ends the command."""
        from longspan import Client

        try:
            return Client(self.host, self.port, timeout=timeout, **self.options)
        except ValueError as error:
            fail(str(error), code=2)

    def async_client(self) -> AsyncClient:
        """As ``client``; to be called where the event loop runs."""
        from longspan import AsyncClient

        try:
            return AsyncClient(self.host, self.port, **self.options)
        except ValueError as error:
            fail(str(error), code=2)


def _option(name: str, words: str, **more: Any) -> Any:
    return typer.Option(
        f"--{name.replace('_', '-')}",
        envvar=f"LONGSPAN_{name.upper()}",
        help=words,
        rich_help_panel="Connection",
        **more,
    )


_PLACE: dict[str, tuple[Any, Any]] = {
    "host": (
        Annotated[str, _option("host", "Address of the server, or a target like dns:///NAME.")],
        DEFAULT_HOST,
    ),
    "port": (Annotated[int, _option("port", "Port of its gRPC service.", min=1, max=65535)], DEFAULT_PORT),
}
_ACCESS: dict[str, tuple[Any, Any]] = {
    "tls": (Annotated[bool, _option("tls", "Connect by TLS; the next four options imply it.")], False),
    "ca": (
        Annotated[
            Path | None,
            _option(
                "ca", "PEM file of roots that the server's certificate must come from. Without it: Mozilla's."
            ),
        ],
        None,
    ),
    "cert": (Annotated[Path | None, _option("cert", "PEM file of a certificate to show.")], None),
    "key": (Annotated[Path | None, _option("key", "PEM file of its private key.")], None),
    "server_name": (
        Annotated[
            str | None,
            _option("server_name", "Name in the server's certificate, where it is not the address."),
        ],
        None,
    ),
    "token": (
        Annotated[
            str | None,
            _option("token", "Token to show. Set the variable instead where others may list processes."),
        ],
        None,
    ),
}
NAMES = (*_PLACE, *_ACCESS)
"""Names of the options' parameters."""

VARIABLES = tuple(f"LONGSPAN_{name.upper()}" for name in NAMES)
"""Their variables of the environment."""


def connected(command: Callable[..., None]) -> Callable[..., None]:
    """A command with these options in place of its one parameter ``connection``."""
    hints = get_type_hints(command, include_extras=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    own = [
        parameter.replace(annotation=hints[name], kind=kind)
        for name, parameter in inspect.signature(command).parameters.items()
        if name != "connection"
    ]
    added = [
        inspect.Parameter(name, kind, default=default, annotation=annotation)
        for name, (annotation, default) in (_PLACE | _ACCESS).items()
    ]

    def run(**values: Any) -> None:
        host, port = values.pop("host"), values.pop("port")
        given = {name: value for name in _ACCESS if (value := values.pop(name))}
        command(connection=Connection(host, port, cast("ConnectOptions", given)), **values)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *added)}
    return run
