"""The connection of both clients, the synchronous and the asyncio one: channel, stubs and limits of calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Generic, TypeVar, Unpack

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2_grpc

from longspan.affinity import Affinity
from longspan.channel import DEFAULT_HOST, DEFAULT_PORT, ConnectOptions, connect, headers, target
from longspan.request import Prompt, build_request
from longspan.v1 import encoder_pb2_grpc, inference_pb2, inference_pb2_grpc

ChannelT = TypeVar("ChannelT", bound="grpc.Channel | grpc.aio.Channel")


class Connected(Generic[ChannelT]):
    """A connection to one server. ``timeout``, in seconds, may be changed for later calls."""

    _api: ClassVar[Any]  # grpc or grpc.aio

    def __init__(
        self,
        host: str = DEFAULT_HOST,
        port: int = DEFAULT_PORT,
        *,
        timeout: float | None = None,
        channel: ChannelT | None = None,
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
        self.timeout = _above_zero(timeout)
        self._headers = headers(options)
        self._affinity = Affinity(options.get("affinity"))
        self._own_channel = channel is None
        self._channel: Any = connect(self._api, self._server, channel, options)
        self._stub: Any = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._encoders: Any = encoder_pb2_grpc.EncoderServiceStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    def _limit(self, timeout: float | None) -> float | None:
        return _above_zero(self.timeout if timeout is None else timeout)

    def _streamed(self, prompt: Prompt, timeout: float | None, options: Mapping[str, Any]) -> Any:
        """The call of a stream, begun."""
        request = inference_pb2.StreamGenerateRequest(request=build_request(prompt, options))
        metadata = (*self._headers, *self._affinity.of(request.request))
        return self._stub.StreamGenerate(request, timeout=self._limit(timeout), metadata=metadata)


def _above_zero(timeout: float | None) -> float | None:
    """A time limit in seconds; ``None`` is none.

    Raises:
        ValueError: no call could end within it.
    """
    if timeout is not None and not timeout > 0:
        raise ValueError(f"timeout is {timeout}; it must be above 0 seconds, or None for no limit")
    return timeout
