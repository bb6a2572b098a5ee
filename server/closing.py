"""The end of a server's parts, within a bound."""

from __future__ import annotations

import asyncio
import logging

from server.api.listen import Listening
from server.background import in_thread
from server.engine.ipc.link import EngineClient
from server.engine.ipc.spare import Spare
from server.observe.http_server import HttpServer
from server.observe.tracing import Traces

log = logging.getLogger("longspan.server")

LAST_WORDS_SECONDS = 0.5
"""For gRPC to send its last messages, once no request is running."""

CLOSE_SECONDS = 1.75
"""For all the rest, side by side.

With these and 25 s of draining a server ends within 28 s, of the 30 s that a pod gets before it is killed."""


async def close(
    grpc: Listening | None,
    engine: EngineClient | None,
    spare: Spare,
    http: HttpServer | None,
    traces: Traces | None,
) -> None:
    """Ends the parts that there are.

    Args:
        grpc: answers calls, which are ended.
        engine: its process ends.
        spare: the process that is kept in reserve.
        http: serves the metrics.
        traces: the last ones are sent.
    """
    if grpc is not None:
        await grpc.stop(LAST_WORDS_SECONDS)
    ends = {"the process kept in reserve": asyncio.ensure_future(in_thread(spare.end))}
    if engine is not None:
        ends["the engine"] = asyncio.ensure_future(engine.stop())
    if http is not None:
        ends["the metrics' server"] = asyncio.ensure_future(in_thread(http.close))
    if traces is not None:
        ends["sending the last traces"] = asyncio.ensure_future(in_thread(traces.close))
    await asyncio.wait(ends.values(), timeout=CLOSE_SECONDS)
    for name, end in ends.items():
        if not end.done():
            log.warning("%s did not end within %.2f s", name, CLOSE_SECONDS)
            end.cancel()
        elif (error := end.exception()) is not None:
            log.error("%s did not end well", name, exc_info=error)
