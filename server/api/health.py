"""The standard health service: the empty name is liveness, those of services are readiness."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from longspan.v1 import encoder_pb2, inference_pb2
from server.api.errors import ServiceError, quote

READINESS = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
ENCODERS = encoder_pb2.DESCRIPTOR.services_by_name["EncoderService"].full_name

_Status = health_pb2.HealthCheckResponse


class HealthServicer(health_pb2_grpc.HealthServicer):
    """Health of the process and of the inference service.

    The servicer that ships with grpcio-health-checking (1.81) forgets the other watchers of a service when
    one of them leaves, and blocks a status change while a watcher doesn't read; this one does neither.
    """

    def __init__(self, others: Sequence[str] = ()) -> None:
        """Begins as not ready.

        Args:
            others: full names of services that are ready when Longspan's are.
        """
        self._services = (READINESS, ENCODERS, *others)
        self._statuses = {"": _Status.SERVING} | dict.fromkeys(self._services, _Status.NOT_SERVING)
        self._changed = asyncio.Event()

    @property
    def ready(self) -> bool:
        """Whether requests are answered."""
        return self._statuses[READINESS] == _Status.SERVING

    def set_ready(self, ready: bool) -> None:
        """Changes readiness; watchers are told."""
        status = _Status.SERVING if ready else _Status.NOT_SERVING
        self._statuses |= dict.fromkeys(self._services, status)
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> _Status:  # noqa: N802
        """The status at this moment.

        Raises:
            ServiceError: NOT_FOUND for a service that isn't served.
        """
        status = self._statuses.get(request.service)
        if status is None:
            *first, last = map(repr, self._statuses)
            known = f"{', '.join(first)} and {last}"
            sentence = f"no service named {quote(request.service)} here; known are {known}"
            raise ServiceError(grpc.StatusCode.NOT_FOUND, sentence, "SERVICE_NOT_FOUND")
        return _Status(status=status)

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> AsyncIterator[_Status]:
        """The status at this moment and after each change."""
        last = None
        while True:
            changed = self._changed
            status = self._statuses.get(request.service, _Status.SERVICE_UNKNOWN)
            if status != last:
                last = status
                yield _Status(status=status)
            if changed is self._changed:
                await changed.wait()
