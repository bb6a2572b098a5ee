"""``grpc.channelz.v1.Channelz``: what gRPC itself counts of servers, connections and calls, for debugging."""

from __future__ import annotations

from typing import Any

from grpc_channelz.v1 import channelz_pb2
from grpc_channelz.v1.channelz import aio as channelz_aio

from server.api.errors import ServiceError
from server.api.other_service import OtherService, other_service
from server.api.service import InferenceServicer


def service(inference: InferenceServicer) -> OtherService:
    """The service; it tells of gRPC, and nothing of ``inference``."""
    descriptor = channelz_pb2.DESCRIPTOR.services_by_name["Channelz"]
    return other_service(descriptor, _Checked(), accounted=())


class _Checked:
    """grpcio-channelz' own servicer, with its statuses as errors, which are counted as such."""

    def __getattr__(self, method: str) -> Any:
        behavior = getattr(channelz_aio.ChannelzServicer, method)

        async def answer(request: Any, context: Any) -> Any:
            response = await behavior(request, context)
            if response is None:
                raise ServiceError(context.code(), context.details(), "CHANNELZ")
            return response

        return answer
