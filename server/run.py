"""The server process: an event loop that runs a server, and what ends it."""

from __future__ import annotations

import asyncio
import sys

import uvloop

from server.access.granted import Access
from server.app import Server
from server.engine.ipc.spawn import Spawned
from server.errors import RefusedError
from server.observe.logging import configure_logging
from server.settings import Settings


def serve(settings: Settings, access: Access, spawned: Spawned | None = None) -> int:
    """Runs a server until it ends.

    Args:
        settings: of the server.
        access: what they grant.
        spawned: as of ``Server``.

    Returns:
        The process's exit code.
    """
    configure_logging(settings.log_level, settings.log_format)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(Server(settings, access, spawned).run())
    except RefusedError as error:
        print(f"longspan: {error}", file=sys.stderr)
        return 1
    finally:
        from server.text.template_process import template_process

        template_process().close()
