"""The end of a server's parts, within a bound."""

from __future__ import annotations

import asyncio
import logging
from wsgiref.simple_server import WSGIServer

from grpc import aio

from server.background import in_thread
from server.engine.ipc.link import EngineClient
from server.engine.ipc.spare import Spare
from server.observe.tracing import Traces

log = logging.getLogger("longspan.server")

LAST_WORDS_SECONDS = 0.5
"""For gRPC to send its last messages, once no request is running."""

CLOSE_SECONDS = 1.75
"""For all the rest, side by side.

With these and 25 s of draining a server ends within 28 s, of the 30 s that a pod gets before it is killed."""


async def close(
    grpc: aio.Server | None,
    engine: EngineClient | None,
    spare: Spare,
    http: WSGIServer | None,
    traces: Traces | None,
) -> None:
    """Ends the parts that there are.

    Args:
        grpc: the gRPC server, whose calls are ended.
        engine: its process ends.
        spare: the process that is kept in reserve.
        http: serves the metrics.
        traces: the last ones are sent.
    """
    if grpc is not None:
        await grpc.stop(LAST_WORDS_SECONDS)
    ends = [] if engine is None else [engine.stop()]
    if http is not None:
        ends.append(in_thread(http.shutdown))
    if traces is not None:
        ends.append(in_thread(traces.close))
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await asyncio.gather(*ends)
    except TimeoutError:  # of the collector of traces, which is not there: the others end sooner
        log.warning("the last traces were not sent within %.2f s", CLOSE_SECONDS)
    spare.end()
    if http is not None:
        http.server_close()
