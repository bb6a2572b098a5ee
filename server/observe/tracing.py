"""OpenTelemetry traces: one span per generation request, with its queue, prefill and decode as children.

The packages are the extra ``otel`` and are imported only where traces are asked for. A request's times are
known when it ends, so its spans are made then, with the times that the metrics use.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import grpc

from server.errors import RefusedError
from server.observe.request import Moments

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

Metadata = Sequence[tuple[str, str | bytes]]


class Traces:
    """Sends spans to a collector, in the background.

    Args:
        endpoint: where the collector takes OTLP over gRPC, like ``http://127.0.0.1:4317``.
        version: of the server, for the resource.
        exporter: where spans go instead, for tests.

    Raises:
        RefusedError: the packages are not installed.
    """

    def __init__(self, endpoint: str, version: str, exporter: SpanExporter | None = None) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise RefusedError(
                f"--otlp-endpoint needs OpenTelemetry ({error}); install it: pip install 'longspan[otel]'"
            ) from error
        resource = Resource.create({"service.name": "longspan", "service.version": version})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(
            BatchSpanProcessor(exporter or OTLPSpanExporter(endpoint, insecure=endpoint.startswith("http:")))
        )
        self._tracer = self._provider.get_tracer("longspan", version)
        self._propagator = TraceContextTextMapPropagator()
        # One shift for all, so that a trace's spans keep the distances of the monotonic clock.
        self._epoch = time.time() - time.monotonic()

    def request(
        self,
        metadata: Metadata,
        moments: Moments,
        code: grpc.StatusCode,
        attributes: Mapping[str, str | int | float | list[str]],
    ) -> None:
        """Records a request that has just ended, however it ended.

        Args:
            metadata: of the call; ``traceparent`` in it makes the span a child of the client's.
            moments: times of its events.
            code: how it ended.
            attributes: of the request's span, named by OpenTelemetry's conventions for generative AI.
        """
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        carrier = {key: value for key, value in metadata if isinstance(value, str)}
        span = self._tracer.start_span(
            "generate",
            self._propagator.extract(carrier),
            SpanKind.SERVER,
            {**attributes, "rpc.grpc.status_code": int(code.value[0])},
            start_time=self._nanoseconds(moments.arrival),
        )
        if code is not grpc.StatusCode.OK:
            span.set_status(Status(StatusCode.ERROR, code.name))
        inside = set_span_in_context(span)
        for name, begin, end in moments.phases():
            child = self._tracer.start_span(name, inside, start_time=self._nanoseconds(begin))
            child.end(self._nanoseconds(end))
        span.end(self._nanoseconds(moments.end))

    def close(self) -> None:
        """Sends the remaining spans, for a few seconds at most."""
        self._provider.shutdown()

    def _nanoseconds(self, when: float) -> int:
        return int((when + self._epoch) * 1e9)
