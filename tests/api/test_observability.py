"""What a request leaves behind beside the metrics: a line in the log and a trace."""

import asyncio
import io
import json
import logging
import sys

import grpc
import pytest
from grpc import aio
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from server.errors import RefusedError
from server.observe.logging import configure_logging
from server.observe.tracing import Traces
from tests.api.conftest import ask, until

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


@pytest.fixture
def lines(monkeypatch):
    """What the server logs as JSON, from now on."""
    root, ours = logging.getLogger(), logging.getLogger("longspan")
    before = root.handlers[:], root.level, ours.level
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    configure_logging("info", "json")
    yield lambda: [json.loads(line) for line in written.getvalue().splitlines()]
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])


@pytest.fixture
def spans(monkeypatch, loading):
    """Spans of ended requests, once they were sent."""
    exporter = InMemorySpanExporter()
    traces = Traces("http://127.0.0.1:1", "0", exporter)
    monkeypatch.setattr(loading.service.accounts, "traces", traces)

    def finished():
        traces._provider.force_flush()
        return exporter.get_finished_spans()

    yield finished
    traces.close()


async def test_a_request_is_one_line_of_json(running, lines):
    await running.stub.Generate(ask("hello", request_id="mine"))
    (line,) = [line for line in lines() if line["logger"] == "longspan.requests"]
    assert line["message"].startswith("request mine: OK, length; 5 prompt tokens, 5 generated, ")
    assert line["level"] == "INFO"
    assert line["request_id"] == "mine"
    assert (line["grpc_code"], line["finish_reason"]) == ("OK", "length")
    assert (line["prompt_tokens"], line["completion_tokens"]) == (5, 5)
    assert 0 < line["seconds"] < 60
    assert line["timestamp"].endswith("+00:00")


async def test_other_records_name_the_request_that_they_are_about(running, lines, monkeypatch):
    monkeypatch.setattr(running.engine, "submit", lambda sequences: 1 / 0)
    with pytest.raises(aio.AioRpcError):
        await running.stub.Generate(ask("hello", request_id="unlucky"))
    (line,) = [line for line in lines() if line["level"] == "ERROR"]
    assert line["request_id"] == "unlucky"
    assert "ZeroDivisionError" in line["exc_info"]


async def test_a_trace_has_queue_prefill_and_decode_below_the_clients_span(running, spans):
    running.engine.step_seconds = 0.002
    await running.stub.Generate(
        ask(request_id="traced"), metadata=[("traceparent", f"00-{TRACE}-{PARENT}-01")]
    )
    by_name = {span.name: span for span in spans()}
    assert set(by_name) == {"generate", "queue", "prefill", "decode"}
    root = by_name["generate"]
    assert f"{root.context.trace_id:032x}" == TRACE
    assert f"{root.parent.span_id:016x}" == PARENT
    assert root.attributes["gen_ai.response.id"] == "traced"
    assert root.attributes["gen_ai.usage.output_tokens"] == 5
    assert root.status.status_code is StatusCode.UNSET
    phases = [by_name[name] for name in ("queue", "prefill", "decode")]
    assert all(phase.parent.span_id == root.context.span_id for phase in phases)
    assert phases[0].start_time == root.start_time
    assert phases[0].end_time == phases[1].start_time
    assert phases[1].end_time == phases[2].start_time
    assert phases[2].start_time < phases[2].end_time <= root.end_time


async def test_a_request_that_comes_to_nothing_has_a_span_too(running, spans):
    with pytest.raises(aio.AioRpcError):
        await running.stub.Generate(ask(sampling={"temperature": -1.0}))
    root = next(span for span in spans() if span.name == "generate")
    assert root.status.status_code is StatusCode.ERROR
    assert root.status.description == "INVALID_ARGUMENT"
    assert root.attributes["rpc.grpc.status_code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert root.parent is None


async def test_a_request_cut_off_has_the_phases_that_it_reached(running, spans):
    running.engine.open.clear()
    call = running.stub.Generate(ask())
    await until(lambda: bool(running.engine.submitted))
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await until(lambda: len(running.state.admission) == 0)
    assert {span.name for span in spans()} == {"generate", "queue"}


def test_without_the_packages_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(RefusedError, match=r"pip install 'longspan\[otel\]'"):
        Traces("http://127.0.0.1:4317", "0")


def test_a_collector_that_is_not_there_does_not_hold_up_the_end():
    traces = Traces("http://127.0.0.1:1", "0")
    before = asyncio.new_event_loop().time()
    traces.close()
    assert asyncio.new_event_loop().time() - before < 5
