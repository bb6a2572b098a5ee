"""``longspan health``: whether a server is ready, as an exit code."""

from __future__ import annotations

from typing import Annotated

import typer

from server.cli.connection import Connection, connected
from server.cli.shared import fail, fail_call


@connected
def health(
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the server is ready.")] = False,
    timeout: Annotated[
        float | None,
        typer.Option(min=0.0, help="Seconds to wait. Without it: 5, or with --wait until it is ready."),
    ] = None,
    *,
    connection: Connection,
) -> None:
    """End with 0 when the server is ready, else with 1 and the reason."""
    from longspan import LongspanError

    with connection.client() as client:
        try:
            if wait:
                client.wait_until_ready(timeout)
            elif not client.health(timeout=5.0 if timeout is None else timeout):
                fail("the server is up but not ready: it loads, drains, or has lost its engine")
        except LongspanError as error:
            fail_call(error)
