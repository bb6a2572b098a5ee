"""Requests to a server of Longspan."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from loadtest.greedy import GREEDY
from loadtest.load.targets import Server
from loadtest.load.types import Record, Turn
from longspan import AsyncClient, LongspanError


class GrpcSender:
    """A connection to one server, as an asynchronous context manager: it is there when the block begins."""

    def __init__(self, server: Server) -> None:
        self._client = AsyncClient(server.host, server.port)

    async def __aenter__(self) -> Self:
        """Connects."""
        await self._client.__aenter__()
        await self._client.server_info(timeout=30)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the connection."""
        await self._client.__aexit__(kind, error, trace)

    async def send(self, turn: Turn, record: Record) -> str:
        """Sends one greedy request of exactly so many output tokens and times its stream; gives its text."""
        record.sent = time.monotonic()
        try:
            stream = self._client.stream(
                turn.prompt, max_tokens=turn.output_tokens, ignore_eos=True, **GREEDY
            )
        except LongspanError as error:  # a message can't hold it
            record.ended, record.code, record.error = time.monotonic(), error.code.name, str(error)
            return ""
        record.sent = time.monotonic()
        parts = []
        try:
            async with stream:
                async for delta in stream:
                    if count := len(delta.token_ids):
                        record.arrivals.append((time.monotonic(), count))
                    parts.append(delta.text)
        except LongspanError as error:
            record.code, record.error = error.code.name, str(error)
        finally:
            record.ended = time.monotonic()
            record.prompt_tokens, record.cached_tokens = stream.prompt_tokens, stream.cached_prompt_tokens
        if not record.error and record.tokens != turn.output_tokens:
            record.error = f"got {record.tokens} tokens instead of {turn.output_tokens}"
        return "".join(parts)

    def finish(self) -> None:
        """Nothing: the server counts tokens as it sends them."""
