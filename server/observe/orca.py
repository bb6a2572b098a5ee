"""Load reports of the Open Request Cost Aggregation (ORCA), by which balancers weigh servers."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from longspan.v1 import types_pb2
from server.messages import Stats
from server.observe.orca_messages import SERVICE, OrcaLoadReport, OrcaLoadReportRequest

TRAILER = "endpoint-load-metrics-bin"
# What clients may ask for at most, and what they get if they don't say.
_FASTEST_SECONDS, _USUAL_SECONDS = 0.1, 10.0
# Rates are of about this long ago until now.
_RATE_SECONDS = 10.0


class Rate:
    """Events per second, those of long ago weighing less and less: an average that decays by the second."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._count = 0.0
        self._seen = clock()

    def add(self) -> None:
        """One more event, now."""
        self._decay()
        self._count += 1

    @property
    def per_second(self) -> float:
        """The rate now."""
        self._decay()
        return self._count / _RATE_SECONDS

    def _decay(self) -> None:
        now = self._clock()
        self._count *= math.exp((self._seen - now) / _RATE_SECONDS)
        self._seen = now


class LoadReports:
    """Makes the reports.

    Balancers weigh by ``application_utilization``: sequences that run or wait, as a share of those that may
    run, or the held share of the KV cache where that is more. It is over 1 where requests wait.

    Args:
        load: tells the engine's load after its last step.
        max_running: tells how many sequences may run.
    """

    def __init__(self, load: Callable[[], Stats], max_running: Callable[[], int]) -> None:
        self._load = load
        self._max_running = max_running
        self._ended, self._failed = Rate(), Rate()

    def count(self, *, failed: bool) -> None:
        """A request has ended."""
        self._ended.add()
        if failed:
            self._failed.add()

    def report(self, usage: types_pb2.Usage | None = None) -> Any:
        """The load now, an ``OrcaLoadReport``, with what a request cost in tokens."""
        load = self._load()
        kv = load.pages_used / max(load.pages_total, 1)
        # At least the request that is answered: a server without any load would be given no weight.
        busy = max(load.running + load.waiting, 1) / max(self._max_running(), 1)
        report = OrcaLoadReport(
            application_utilization=max(busy, kv),
            rps_fractional=self._ended.per_second,
            eps=self._failed.per_second,
            named_metrics={
                "running": load.running,
                "waiting": load.waiting,
                "kv_cache_usage": kv,
            },
        )
        if usage is not None:
            report.request_cost.update(
                prompt_tokens=usage.prompt_tokens,
                cached_prompt_tokens=usage.cached_prompt_tokens,
                completion_tokens=usage.completion_tokens,
            )
        return report

    def handler(self) -> grpc.GenericRpcHandler:
        """The service of reports out of band: one at once, then one per interval that the client asks for."""
        method = grpc.unary_stream_rpc_method_handler(
            self._stream,
            request_deserializer=OrcaLoadReportRequest.FromString,
            response_serializer=OrcaLoadReport.SerializeToString,
        )
        return grpc.method_handlers_generic_handler(SERVICE, {"StreamCoreMetrics": method})

    async def _stream(self, request: Any, _context: Any) -> AsyncIterator[Any]:
        # Not as a timedelta, which takes no more than some million years.
        asked = request.report_interval.seconds + 1e-9 * request.report_interval.nanos
        interval = max(asked or _USUAL_SECONDS, _FASTEST_SECONDS)
        while True:
            yield self.report()
            await asyncio.sleep(interval)
