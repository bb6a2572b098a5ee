"""The asyncio client: the synchronous one's calls as coroutines. Create it where the event loop runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, ClassVar, Self, Unpack

import grpc
import grpc.aio
from google.protobuf.message import Message as ProtoMessage
from grpc_health.v1 import health_pb2

from longspan.channel import SERVICE, Metadata
from longspan.connected import Connected
from longspan.encoding import (
    EmbedOptions,
    FillMaskOptions,
    ScoreOptions,
    Texts,
    build_embed,
    build_fill_mask,
    build_score,
)
from longspan.errors import CancelledError, LongspanError, UnavailableError, from_rpc_error
from longspan.request import (
    GenerateOptions,
    Message,
    Prompt,
    build_count,
    build_detokenize,
    build_request,
    build_tokenize,
)
from longspan.results import Delta, Generation, StreamState
from longspan.v1 import encoder_pb2, inference_pb2

_POLL_SECONDS = 0.1


class AsyncStream(StreamState):
    """A generation as it happens: iterate with ``async for`` for its deltas, once.

    Leaving the loop early cancels the request on the server: at once with ``async with`` or ``close``, after
    a bare ``break`` as soon as the event loop runs.

    Iterating raises ``LongspanError``: the call failed, which for a request that the server refuses is at the
    first step.
    """

    _closed = False

    async def __aiter__(self) -> AsyncIterator[Delta]:
        try:
            async for response in self._call:
                delta = self._take(response)
                if delta is not None:
                    yield delta
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._server) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closed and not (task and task.cancelling()):  # close() ended the call, not the task
                raise CancelledError("The stream was closed.") from None
            raise
        finally:
            self.close()

    def close(self) -> None:
        """Cancels the request on the server unless it has ended; a waiting loop raises ``CancelledError``."""
        self._closed = True
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


class AsyncClient(Connected[grpc.aio.Channel]):
    """A connection to one server. Every call raises ``LongspanError`` or one of its subclasses.

    ``timeout`` is in seconds; when it has passed, the server stops working on the call too. Without one
    there is no limit. The attribute ``timeout`` may be changed for later calls. Cancelling the
    task that waits cancels the call on the server.
    """

    _api: ClassVar[Any] = grpc.aio

    async def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Generation:
        """Like ``Client.generate``."""
        request = build_request(prompt, options)
        affinity = self._affinity.of(request)
        return Generation.from_message(await self._ask(self._stub.Generate, request, timeout, affinity))

    def stream(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncStream:
        """Like ``Client.stream``: ``async for delta in client.stream(...)``."""
        return AsyncStream(self._streamed(prompt, timeout, options), self._server)

    async def embed(
        self, texts: Texts, *, timeout: float | None = None, **options: Unpack[EmbedOptions]
    ) -> encoder_pb2.EmbedResponse:
        """Like ``Client.embed``."""
        return await self._ask(self._encoders.Embed, build_embed(texts, options), timeout)

    async def score(
        self,
        inputs: Sequence[str | tuple[str, str]],
        *,
        timeout: float | None = None,
        **options: Unpack[ScoreOptions],
    ) -> encoder_pb2.ScoreResponse:
        """Like ``Client.score``."""
        return await self._ask(self._encoders.Score, build_score(inputs, options), timeout)

    async def fill_mask(
        self, texts: str | Sequence[str], *, timeout: float | None = None, **options: Unpack[FillMaskOptions]
    ) -> encoder_pb2.FillMaskResponse:
        """Like ``Client.fill_mask``."""
        return await self._ask(self._encoders.FillMask, build_fill_mask(texts, options), timeout)

    async def abort(self, request_id: str, *, timeout: float | None = None) -> bool:
        """Like ``Client.abort``."""
        request = inference_pb2.AbortRequest(request_id=request_id)
        return (await self._ask(self._stub.Abort, request, timeout)).found

    async def tokenize(
        self,
        value: str | Sequence[Message],
        *,
        model: str = "",
        special_tokens: bool = True,
        special_tokens_as_text: bool = False,
        timeout: float | None = None,
    ) -> inference_pb2.TokenizeResponse:
        """Like ``Client.tokenize``."""
        request = build_tokenize(
            value, model, special_tokens=special_tokens, special_tokens_as_text=special_tokens_as_text
        )
        return await self._ask(self._stub.Tokenize, request, timeout)

    async def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        model: str = "",
        keep_special_tokens: bool = False,
        timeout: float | None = None,
    ) -> str:
        """Like ``Client.detokenize``."""
        request = build_detokenize(token_ids, model, keep_special_tokens=keep_special_tokens)
        return (await self._ask(self._stub.Detokenize, request, timeout)).text

    async def count_tokens(
        self,
        value: str | Sequence[Message],
        *,
        model: str = "",
        special_tokens_as_text: bool = False,
        timeout: float | None = None,
    ) -> inference_pb2.CountTokensResponse:
        """Like ``Client.count_tokens``."""
        request = build_count(value, model, special_tokens_as_text=special_tokens_as_text)
        return await self._ask(self._stub.CountTokens, request, timeout)

    async def models(self, *, timeout: float | None = None) -> list[str]:
        """Like ``Client.models``."""
        response = await self._ask(self._stub.ListModels, inference_pb2.ListModelsRequest(), timeout)
        return list(response.models)

    async def model_info(
        self, model: str = "", *, timeout: float | None = None
    ) -> inference_pb2.GetModelInfoResponse:
        """Like ``Client.model_info``."""
        request = inference_pb2.GetModelInfoRequest(model=model)
        return await self._ask(self._stub.GetModelInfo, request, timeout)

    async def server_info(self, *, timeout: float | None = None) -> inference_pb2.GetServerInfoResponse:
        """Like ``Client.server_info``."""
        return await self._ask(self._stub.GetServerInfo, inference_pb2.GetServerInfoRequest(), timeout)

    async def health(self, *, timeout: float | None = None) -> bool:
        """Like ``Client.health``."""
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        status = (await self._ask(self._health.Check, request, timeout)).status
        return bool(status == health_pb2.HealthCheckResponse.SERVING)

    async def wait_until_ready(self, timeout: float | None = None) -> None:
        """Like ``Client.wait_until_ready``."""
        limit = self._limit(timeout)
        end = None if limit is None else time.monotonic() + limit
        while True:
            left = None if end is None else max(0.001, end - time.monotonic())
            try:
                if await self.health(timeout=5.0 if left is None else min(5.0, left)):
                    return
                lacking = (
                    f"The server at {self._server} is up but not ready: it loads, drains, or has no engine."
                )
            except LongspanError as error:
                lacking = str(error)
            if end is not None and time.monotonic() + _POLL_SECONDS >= end:
                raise UnavailableError(f"Not ready within {limit:g} s. {lacking}")
            await asyncio.sleep(_POLL_SECONDS)

    async def close(self) -> None:
        """Closes the connection, unless it was given; calls that are running are cancelled."""
        if self._own_channel:
            await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _ask(
        self, method: Any, request: ProtoMessage, timeout: float | None, affinity: Metadata = ()
    ) -> Any:
        metadata = (*self._headers, *affinity)
        try:
            return await method(request, timeout=self._limit(timeout), metadata=metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._server) from None
