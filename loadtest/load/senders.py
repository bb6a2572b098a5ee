"""Senders of requests, for every kind of target."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeAlias

from loadtest.load.targets import Server, Target
from loadtest.load.types import Turn
from loadtest.measuring.records import Record
from loadtest.measuring.requests import send
from longspan import AsyncClient, LongspanError

if TYPE_CHECKING:
    from loadtest.load.over_http import HttpSender


class GrpcSender:
    """Sends requests to a server of Longspan, through a client that is connected."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

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


Sender: TypeAlias = "GrpcSender | HttpSender"


@asynccontextmanager
async def sender(target: Target) -> AsyncIterator[Sender]:
    """The sender for ``target``, which is connected when the block begins and closed when it ends."""
    if isinstance(target, Server):
        async with AsyncClient(target.host, target.port, **target.connect) as client:
            await client.models(timeout=30)
            yield GrpcSender(client)
        return
    from loadtest.load.over_http import http_sender  # its library need not be installed

    async with http_sender(target) as found:
        yield found
