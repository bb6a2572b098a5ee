"""Sends hostile inputs at a rate, and counts what becomes of them."""

from __future__ import annotations

import asyncio
import random
import time

import grpc
import grpc.aio

from tests.e2e.server import Server
from tests.soak.inputs import COUNTED, Input, inputs
from tests.soak.record import Record

_TIMEOUT = 3.0
# Inputs under way; while an engine starts again more would pile up.
_MOST = 32
# How long the port may take to close a connection that speaks no HTTP/2.
_PATIENCE = 1.0
_STRANGERS = ((), (("authorization", "Bearer none"),), (("authorization", "Basic x"),), (("x-bin", b"\xff"),))


class Senders:
    """Sends the inputs of a seed.

    Args:
        server: to which they go.
        token: shown with inputs that are to be known.
        record: counts them.
        rng: draws them.

    Attributes:
        ended: set to end.
    """

    def __init__(self, server: Server, token: str, record: Record, rng: random.Random) -> None:
        self._server = server
        self._headers = (("authorization", f"Bearer {token}"),)
        self._record = record
        self._rng = rng
        self.ended = False

    async def send(self, per_second: float) -> None:
        """Sends until told to end. One that has to wait for a place is sent late, not left out."""
        places = asyncio.Semaphore(_MOST)
        options = [("grpc.enable_retries", 0), ("grpc.max_reconnect_backoff_ms", 500)]
        made = inputs(self._rng)
        due = time.monotonic()
        address = f"{self._server.host}:{self._server.port}"
        async with grpc.aio.insecure_channel(address, options) as channel, asyncio.TaskGroup() as group:
            while not self.ended:
                due += 1 / per_second
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                await places.acquire()
                task = group.create_task(self._one(channel, next(made)))
                task.add_done_callback(lambda _: places.release())

    async def _one(self, channel: grpc.aio.Channel, one: Input) -> None:
        self._record.kinds[one.kind] += 1
        self._record.fields |= {one.field} - {""}
        status = await (self._call(channel, one) if one.method else self._connect(one))
        self._record.now.hostile[status] += 1

    async def _call(self, channel: grpc.aio.Channel, one: Input) -> str:
        self._record.sent += one.method.rpartition("/")[2] in COUNTED
        headers = self._headers if one.known else self._rng.choice(_STRANGERS)
        # On the wire a unary call is one that streams a single answer.
        call = channel.unary_stream(one.method)(one.payload, timeout=_TIMEOUT, metadata=headers)
        try:
            async for _ in call:
                pass
            status = (await call.code()).name
        except grpc.aio.AioRpcError as error:
            status = error.code().name
        if not one.known and not one.method.startswith("/grpc.health."):
            self._record.strangers[status] += 1
        return str(status)

    async def _connect(self, one: Input) -> str:
        port = self._rng.choice((self._server.port, self._server.metrics_port))
        try:
            reader, writer = await asyncio.open_connection(self._server.host, port)
        except OSError:
            return "not connected"
        try:
            writer.write(one.payload)
            writer.write_eof()
            await asyncio.wait_for(reader.read(), _PATIENCE)
        except TimeoutError:
            return "left open"
        except OSError:
            return "connection reset"
        finally:
            writer.close()
        return "connection closed"
