"""Requests to a server of Longspan."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from loadtest.load.targets import Server
from loadtest.load.types import Turn
from loadtest.measuring.records import Record
from loadtest.measuring.requests import send
from longspan import AsyncClient, LongspanError


class GrpcSender:
    """A connection to one server, as an asynchronous context manager: it is there when the block begins."""

    def __init__(self, server: Server) -> None:
        self._client = AsyncClient(server.host, server.port, **server.connect)

    async def __aenter__(self) -> Self:
        """Connects."""
        await self._client.__aenter__()
        await self._client.models(timeout=30)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the connection."""
        await self._client.__aexit__(kind, error, trace)

    async def send(self, turn: Turn, record: Record) -> str:
        """Sends one greedy request of exactly so many output tokens and times its stream; gives its text."""
        text = ""
        try:
            text = await send(self._client, turn.prompt, record)
        except LongspanError as error:
            record.code, record.error = error.code.name, str(error)
        if not record.error and record.tokens != turn.output_tokens:
            record.error = f"got {record.tokens} tokens instead of {turn.output_tokens}"
        return text

    def finish(self) -> None:
        """Nothing: the server counts tokens as it sends them."""
