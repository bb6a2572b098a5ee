"""Another engine in place of one that failed, as often as the settings allow."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Protocol

from server.engine.ipc.link import EngineClient
from server.engine.ipc.output import EngineDeadError
from server.engine.restarts import Restarts
from server.errors import RefusedError
from server.settings import Settings

log = logging.getLogger("longspan.server")


class Host(Protocol):
    """The server that serves with the engines."""

    @property
    def draining(self) -> bool:
        """Whether it ends, so that no other engine is to be started."""

    async def start_engine(self) -> EngineClient:
        """Starts an engine, which is not ready yet."""

    def engine_ready(self, engine: EngineClient) -> None:
        """From now on it serves with this one."""

    def engine_failed(self, reason: str) -> None:
        """It has none from now on; ``reason`` is a sentence."""

    def engine_restarts(self, cause: str) -> None:
        """Another one is about to be started; ``cause`` is ``died``, ``hung`` or ``not_ready``."""


async def keep_serving(host: Host, engine: EngineClient, settings: Settings) -> str:
    """Waits for the engine's failure, and starts others after it where the settings say so.

    An engine that does not become ready counts as one that failed.

    Args:
        host: that serves.
        engine: with which it serves now.
        settings: of the server.

    Returns:
        Why it can't go on, a sentence.
    """
    restarts = Restarts(
        settings.restart_limit, settings.restart_window_seconds, settings.restart_backoff_seconds
    )
    since = time.monotonic()
    cause, reason = await _failure(host, engine)
    served = time.monotonic() - since
    while not host.draining:
        if settings.on_engine_failure == "exit":
            return f"the engine died ({reason}); with --on-engine-failure restart it would start again"
        if (seconds := restarts.failed(served)) is None:
            return (
                f"the engine failed {restarts.words}, the last time with this reason: {reason}; it is not "
                "started again (--restart-limit, --restart-window-seconds)"
            )
        when = f"in {seconds:g} s" if seconds else "now"
        log.error("the engine failed (%s) and is started again %s", reason, when)
        await engine.stop()
        await asyncio.sleep(seconds)
        host.engine_restarts(cause)
        try:
            engine = await host.start_engine()
            await engine.wait_ready()
        except (EngineDeadError, RefusedError, OSError) as error:
            cause, reason = "not_ready", str(error)
            host.engine_failed(reason)
            continue
        since = time.monotonic()
        host.engine_ready(engine)
        log.info("the engine is ready again")
        cause, reason = await _failure(host, engine)
        served += time.monotonic() - since
    return reason


async def _failure(host: Host, engine: EngineClient) -> tuple[str, str]:
    reason = await engine.wait_dead()
    host.engine_failed(reason)
    return ("hung" if engine.hung else "died"), reason
