"""Health, reflection, and the port itself."""

import asyncio
import socket
from dataclasses import replace

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import server.api.listen
from longspan.v1 import inference_pb2
from server.access.callers import Callers
from server.api.health import READINESS, HealthServicer
from server.api.listen import Listener, Parts
from server.api.service import InferenceServicer
from server.errors import RefusedError
from server.observe.metrics import GrpcMetrics, Metrics

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


async def test_readiness_follows_and_liveness_stays(loading):
    stub = health_pb2_grpc.HealthStub(loading.channel)
    assert READINESS == "longspan.v1.InferenceService"
    for ready in (False, True, False):
        loading.health.set_ready(ready)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=READINESS))
        assert answer.status == (SERVING if ready else NOT_SERVING)
        assert (await stub.Check(health_pb2.HealthCheckRequest())).status == SERVING
    with pytest.raises(aio.AioRpcError) as caught:
        await stub.Check(health_pb2.HealthCheckRequest(service="x"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_watchers_are_told_also_after_one_has_left(loading):
    stub = health_pb2_grpc.HealthStub(loading.channel)
    request = health_pb2.HealthCheckRequest(service=READINESS)
    left, stays = stub.Watch(request), stub.Watch(request)
    for call in (left, stays):
        assert (await call.read()).status == NOT_SERVING
    left.cancel()
    await asyncio.sleep(0.05)
    for ready in (True, False, True):
        loading.health.set_ready(ready)
        async with asyncio.timeout(30):
            assert (await stays.read()).status == (SERVING if ready else NOT_SERVING)
    unknown = stub.Watch(health_pb2.HealthCheckRequest(service="x"))
    assert (await unknown.read()).status == UNKNOWN
    stays.cancel()
    unknown.cancel()


async def test_reflection_lists_the_services(loading):
    stub = reflection_pb2_grpc.ServerReflectionStub(loading.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    call = stub.ServerReflectionInfo(iter([request]))
    answers = [answer async for answer in call]
    names = {service.name for service in answers[0].list_services_response.service}
    assert {READINESS, "grpc.health.v1.Health"} <= names
    labels = {"grpc_type": "bidi_stream", "grpc_method": "ServerReflectionInfo", "grpc_code": "OK"}
    labels["grpc_service"] = "grpc.reflection.v1alpha.ServerReflection"
    assert loading.sample("longspan_grpc_server_handled_total", **labels) == 1


@pytest.mark.parametrize("after", [0, 1])
async def test_reflection_refuses_bytes_that_are_no_request_of_it(loading, after, caplog):
    call = loading.channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
    good = reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()
    stream = call(iter([good] * after + [b"\xff\xff\xff"]))
    for _ in range(after):
        assert await stream.read() is not aio.EOF
    with pytest.raises(aio.AioRpcError) as caught:
        await stream.read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "not a valid grpc.reflection.v1alpha.ServerReflectionRequest" in caught.value.details()
    assert not caplog.records


async def test_a_busy_port_is_refused(loading, settings):
    parts = Parts(
        host="127.0.0.1",
        port=0,
        state=loading.state,
        service=InferenceServicer(loading.state, loading.metrics),
        health=HealthServicer(),
        metrics=GrpcMetrics(Metrics().registry),
        callers=Callers(),
    )
    first = Listener(parts)
    await first.start()
    try:
        with pytest.raises(RefusedError, match="--port"):
            await Listener(replace(parts, port=first.port)).start()
    finally:
        await first.stop(0)


async def test_a_port_that_is_not_free_at_once_is_tried_again(loading, monkeypatch):
    tried = []

    def refuse_taken(host, port):
        tried.append(port)
        if len(tried) < 3:
            raise RefusedError("it is taken")

    monkeypatch.setattr(server.api.listen, "refuse_taken", refuse_taken)
    await loading.server.renew()
    assert tried == [loading.port] * 3
    assert (await loading.stub.GetServerInfo(inference_pb2.GetServerInfoRequest())).version

    monkeypatch.setattr(server.api.listen, "_FREE_SECONDS", 0)
    tried.clear()
    with pytest.raises(RefusedError, match=r"it is taken .the server had it until .* --max-request-bytes"):
        await loading.server.renew()


async def test_where_one_address_of_a_host_is_taken_it_is_refused(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        def both(*_, **__):
            first = (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.2", port))
            return [first, (*first[:4], ("127.0.0.1", port))]

        monkeypatch.setattr(socket, "getaddrinfo", both)
        with pytest.raises(RefusedError, match=rf"127\.0\.0\.1:{port} \(Address already in use\)"):
            server.api.listen.refuse_taken("both", port)


async def test_streams_from_before_a_renewal_end_and_the_next_ones_stay(loading, monkeypatch):
    monkeypatch.setattr(server.api.listen, "_OLD_STREAMS_SECONDS", 0.2)
    monkeypatch.delattr(server.api.listen, "connections_allowed")  # which warns: once is enough
    stub = health_pb2_grpc.HealthStub(loading.channel)
    request = health_pb2.HealthCheckRequest(service=READINESS)
    before = stub.Watch(request, timeout=10)
    assert (await before.read()).status == NOT_SERVING
    await loading.server.renew()
    after = stub.Watch(request, timeout=10)
    assert (await after.read()).status == NOT_SERVING
    with pytest.raises(aio.AioRpcError) as caught:
        await before.read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    loading.health.set_ready(True)
    assert (await after.read()).status == SERVING
