"""The asyncio client: the synchronous one's calls as coroutines. Create it where the event loop runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Self, TypeVar, Unpack

import grpc
import grpc.aio
from google.protobuf.message import Message as ProtoMessage
from grpc_health.v1 import health_pb2, health_pb2_grpc

from longspan.affinity import Affinity
from longspan.channel import (
    DEFAULT_HOST,
    DEFAULT_PORT,
    SERVICE,
    ConnectOptions,
    Metadata,
    connect,
    headers,
    target,
)
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
from longspan.limits import seconds
from longspan.request import GenerateOptions, Message, Prompt, build_detokenize, build_request, set_input
from longspan.results import Delta, Generation, StreamState
from longspan.v1 import encoder_pb2, encoder_pb2_grpc, inference_pb2, inference_pb2_grpc

Response = TypeVar("Response", bound=ProtoMessage)

_POLL_SECONDS = 0.1


class AsyncStream(StreamState):
    """A generation as it happens: iterate with ``async for`` for its deltas, once.

    Leaving the loop early cancels the request on the server: at once with ``async with`` or ``close``, after
    a bare ``break`` as soon as the event loop runs.

    Iterating raises ``LongspanError``: the call failed, which for a request that the server refuses is at the
    first step.
    """

    def __init__(self, call: Any, server: str) -> None:
        super().__init__()
        self._call = call
        self._server = server
        self._closed = False

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


class AsyncClient:
    """A connection to one server. Every call raises ``LongspanError`` or one of its subclasses.

    ``timeout`` is in seconds; when it has passed, the server stops working on the call too. Without one
    there is no limit. The attribute ``timeout`` may be changed for later calls. Cancelling the
    task that waits cancels the call on the server.
    """

    def __init__(
        self,
        host: str = DEFAULT_HOST,
        port: int = DEFAULT_PORT,
        *,
        timeout: float | None = None,
        channel: grpc.aio.Channel | None = None,
        **options: Unpack[ConnectOptions],
    ) -> None:
        """Prepares the connection; the first call makes it.

        Args:
            host: name or address of the server, or a target of gRPC's like ``dns:///name``.
            port: its gRPC port.
            timeout: for calls that give none of their own.
            channel: one of your own, which ``close`` leaves open; host and port then only name the server in
                messages.
            **options: see ``ConnectOptions``.

        Raises:
            TypeError: an option has a name that there is not.
            ValueError: the options contradict one another, or one is not what it must be.
        """
        self._server = target(host, port)
        self.timeout = seconds(timeout)
        self._headers = headers(options)
        self._affinity = Affinity(options.get("affinity"))
        self._own_channel = channel is None
        self._channel = connect(grpc.aio, self._server, channel, options)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._encoders = encoder_pb2_grpc.EncoderServiceStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

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
        request = inference_pb2.StreamGenerateRequest(request=build_request(prompt, options))
        metadata = (*self._headers, *self._affinity.of(request.request))
        call = self._stub.StreamGenerate(request, timeout=self._limit(timeout), metadata=metadata)
        return AsyncStream(call, self._server)

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
        request = inference_pb2.TokenizeRequest(
            model=model,
            without_special_tokens=not special_tokens,
            special_tokens_as_text=special_tokens_as_text,
        )
        set_input(request, value)
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
        request = inference_pb2.CountTokensRequest(model=model, special_tokens_as_text=special_tokens_as_text)
        set_input(request, value)
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

    def _limit(self, timeout: float | None) -> float | None:
        return seconds(self.timeout if timeout is None else timeout)

    async def _ask(
        self, method: Any, request: ProtoMessage, timeout: float | None, affinity: Metadata = ()
    ) -> Any:
        metadata = (*self._headers, *affinity)
        try:
            return await method(request, timeout=self._limit(timeout), metadata=metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._server) from None
