"""A whole server in a process of Ray's: an engine, and the methods of the services without a port of gRPC."""

from __future__ import annotations

import asyncio

from server.access.granted import Access, granted
from server.api.state import Served
from server.app import Server
from server.engine.ipc.link import EngineClient
from server.errors import RefusedError
from server.ray.calls import Calls
from server.ray.context import Answer
from server.ray.frames import Pairs
from server.settings import Settings


class Hosted(Server):
    """A server that Ray's process begins and ends, in place of signals.

    Args:
        settings: of the server.

    Raises:
        RefusedError: the settings grant no access.
    """

    listens = Calls

    def __init__(self, settings: Settings) -> None:
        self.access: Access = granted(settings)
        super().__init__(settings, self.access)
        self._ready = asyncio.Event()
        self._life: asyncio.Task[int] | None = None

    def _take_signals(self) -> None:
        """They are Ray's."""

    def _tell_ready(self, served: Served) -> None:
        """The proxy's address is told by who starts that."""

    def engine_ready(self, engine: EngineClient) -> None:
        """As of every server; ``begin`` goes on."""
        super().engine_ready(engine)
        self._ready.set()

    async def begin(self) -> None:
        """Loads the model; returns once it answers.

        Raises:
            RefusedError: it can't serve with these settings.
        """
        self._life = asyncio.create_task(self.run())
        ready = asyncio.create_task(self._ready.wait())
        await asyncio.wait({self._life, ready}, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if self._life.done():
            self._life.result()
            raise RefusedError(self.state.failure or "the server ended before it was ready")

    async def finish(self) -> None:
        """Drains, and ends the engine."""
        self.stop()
        if self._life is not None:
            await asyncio.gather(self._life, return_exceptions=True)

    @property
    def ended(self) -> bool:
        """Whether it answers no more."""
        return self._life is not None and self._life.done()

    @property
    def name(self) -> str:
        """Of its model, once it is ready."""
        return "" if self.state.served is None else self.state.served.name

    async def answer(self, method: str, payload: bytes, metadata: Pairs, peer: str, answer: Answer) -> None:
        """As ``Calls.answer``."""
        assert isinstance(self._grpc, Calls)
        await self._grpc.answer(method, payload, metadata, peer, answer)
