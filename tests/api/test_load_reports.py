"""Load reports to balancers, with ``--load-reports``: in trailers, and as a stream."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from longspan.v1 import inference_pb2, types_pb2
from server.access.callers import Callers
from server.access.identities import token_hash
from server.messages import Stats
from server.observe import orca
from server.observe.orca import LoadReports, Rate
from server.observe.orca_messages import SERVICE, OrcaLoadReport, OrcaLoadReportRequest
from tests.api.conftest import ask
from tests.e2e import http2

TRAILER = orca.TRAILER.encode()


def test_a_report_weighs_what_is_nearest_to_its_bound():
    load = Stats(running=3, waiting=2, pages_total=10, pages_used=4)
    assert LoadReports(lambda: load, lambda: 4).report().application_utilization == 5 / 4
    assert LoadReports(lambda: load, lambda: 64).report().application_utilization == 0.4
    assert LoadReports(Stats, lambda: 8).report().application_utilization == 1 / 8


def test_rates_follow_what_happens():
    now = [0.0]
    rate = Rate(lambda: now[0])
    for second in range(60):
        now[0] = second
        for _ in range(5):
            rate.add()
    assert rate.per_second == pytest.approx(5, rel=0.1)
    now[0] += 60
    assert rate.per_second < 0.05


@pytest.fixture
def settings(settings, request):
    return settings.model_copy(update={"load_reports": getattr(request, "param", True)})


@pytest.fixture
def callers(request, tmp_path):
    if not hasattr(request, "param"):
        return Callers()
    file = tmp_path / "identities.toml"
    file.write_text(f"[me]\ntoken_sha256 = ['{token_hash('mine')}']\n{request.param}\n")
    return Callers(file)


def reports(running, **interval):
    """Asks for the stream of reports, ten a second unless told otherwise."""
    return running.channel.unary_stream(
        f"/{SERVICE}/StreamCoreMetrics",
        request_serializer=OrcaLoadReportRequest.SerializeToString,
        response_deserializer=OrcaLoadReport.FromString,
    )(OrcaLoadReportRequest(report_interval=interval or {"nanos": 100_000_000}))


async def trailers(running, method, request):
    """The encoded trailers of a call, read by hand, since gRPC's clients keep the report to themselves."""
    path = f"/longspan.v1.InferenceService/{method}".encode()
    sent = (http2.BEGIN, http2.call(1, path, request.SerializeToString()))
    received = await asyncio.to_thread(http2.send, ("127.0.0.1", running.port), *sent)
    (ended,) = (
        frame.payload
        for frame in http2.frames(received)
        if frame.kind == http2.HEADERS and frame.flags & http2.END_STREAM
    )
    return ended


def test_a_report_tells_what_a_request_cost():
    usage = types_pb2.Usage(prompt_tokens=7, cached_prompt_tokens=4, completion_tokens=3)
    report = OrcaLoadReport.FromString(LoadReports(Stats, lambda: 1).report(usage).SerializeToString())
    assert report.request_cost == {"prompt_tokens": 7, "cached_prompt_tokens": 4, "completion_tokens": 3}


async def test_each_request_reports_and_a_stream_of_reports_follows(running):
    wrapped = inference_pb2.StreamGenerateRequest(request=ask("hello"))
    assert TRAILER in await trailers(running, "Generate", ask("hello"))
    assert TRAILER in await trailers(running, "StreamGenerate", wrapped)
    assert TRAILER not in await trailers(running, "ListModels", inference_pb2.ListModelsRequest())
    running.state.phase = "draining"
    with pytest.raises(grpc.aio.AioRpcError):
        await running.stub.Generate(ask("hello"))
    running.state.phase = "ready"
    call = reports(running)
    seen = [await call.read() for _ in range(3)]
    call.cancel()
    assert seen[-1].rps_fractional > seen[-1].eps > 0
    assert seen[-1].named_metrics["running"] == 0


async def test_requests_that_no_server_would_answer_are_not_reported(running):
    for _ in range(3):
        with pytest.raises(grpc.aio.AioRpcError):
            await running.stub.Generate(ask("hello", model="another"))
    report = await reports(running).read()
    assert (report.rps_fractional, report.eps) == (0, 0)


@pytest.mark.parametrize("callers", ["tokens_per_minute = 1"], indirect=True)
async def test_limits_of_an_identity_tell_nothing_of_the_server(running):
    metadata = (("authorization", "Bearer mine"),)
    await running.stub.Generate(ask("hello"), metadata=metadata)
    for _ in range(3):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await running.stub.Generate(ask("hello"), metadata=metadata)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    report = running.server._reports.report()
    assert (report.rps_fractional, report.eps) == (pytest.approx(0.1, rel=0.1), 0)


@pytest.mark.parametrize("seconds", [2**63 - 1, -(2**63)])
async def test_any_interval_is_taken(running, seconds):
    assert await reports(running, seconds=seconds).read()


@pytest.mark.parametrize("settings", [False], indirect=True)
async def test_without_the_setting_there_are_none(running):
    assert TRAILER not in await trailers(running, "Generate", ask("hello"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await reports(running).read()
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
