"""``longspan health``: whether a server is ready, as an exit code."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from server.cli.connection import Connection, connected
from server.cli.shared import fail, fail_call

_SECONDS = 5.0
_NOT_READY = "the server is up but not ready: it loads, drains, or has lost its engine"


def _http(name: str, words: str, **more: Any) -> Any:
    """An option with the name, and so the variable, of the server's setting."""
    variable = f"LONGSPAN_{name.upper()}"
    return typer.Option(
        f"--{name.replace('_', '-')}", envvar=variable, help=words, rich_help_panel="With --http", **more
    )


@connected
def health(
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the server is ready.")] = False,
    timeout: Annotated[
        float | None,
        typer.Option(min=0.0, help="Seconds to wait. Without it: 5, or with --wait until it is ready."),
    ] = None,
    http: Annotated[
        bool,
        typer.Option(
            "--http", help="Ask /readyz beside /metrics; it answers where other clients hold all connections."
        ),
    ] = False,
    metrics_host: Annotated[str, _http("metrics_host", "Address of /readyz.")] = "127.0.0.1",
    metrics_port: Annotated[int, _http("metrics_port", "Its port.", min=1, max=65535)] = 9464,
    metrics_tls: Annotated[
        bool, _http("metrics_tls", "It has gRPC's certificate: --ca and --server-name hold for it, too.")
    ] = False,
    *,
    connection: Connection,
) -> None:
    """End with 0 when the server is ready, else with 1 and the reason."""
    seconds = _SECONDS if timeout is None else timeout
    if http:
        if wait:
            fail("--wait asks by gRPC; leave out --http", code=2)
        _ask_http(metrics_host, metrics_port, metrics_tls, connection, seconds)
        return
    from longspan import LongspanError

    with connection.client() as client:
        try:
            if wait:
                client.wait_until_ready(timeout)
            elif not client.health(timeout=seconds):
                fail(_NOT_READY)
        except LongspanError as error:
            fail_call(error)


def _ask_http(host: str, port: int, tls: bool, connection: Connection, seconds: float) -> None:
    """Ends the command unless ``/readyz`` answers 200."""
    from server.cli.readiness import Names, NoAnswerError, readiness

    options = connection.options
    try:
        names = Names(options.get("ca"), options.get("server_name")) if tls else None
        status = readiness(host, port, seconds, names)
    except NoAnswerError as error:
        fail(str(error))
    if status == 503:
        fail(_NOT_READY)
    if status != 200:
        fail(f"{host}:{port} answers /readyz with {status}; is that the address of the server's /metrics?")
