"""TLS on the gRPC port, with the fake engine behind it."""

from __future__ import annotations

import shutil
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from grpc import aio

from longspan.v1 import inference_pb2, inference_pb2_grpc
from server.access.callers import Callers
from server.access.certificates import Certificates
from server.api.health import HealthServicer
from server.api.listen import Listener, Parts
from server.api.service import InferenceServicer
from server.api.state import ServerState
from server.observe.metrics import GrpcMetrics, Metrics
from server.settings import Settings
from tests.authority import Authority, Issued


@pytest.fixture(scope="session")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@asynccontextmanager
async def serving(certificates: Certificates):
    """A server without a model."""
    state, metrics = ServerState(Settings()), Metrics()
    service = InferenceServicer(state, metrics)
    parts = Parts(
        host="127.0.0.1",
        port=0,
        state=state,
        service=service,
        health=HealthServicer(),
        metrics=GrpcMetrics(metrics.registry),
        callers=Callers(),
        certificates=certificates,
    )
    server = Listener(parts)
    await server.start()
    yield server
    await server.stop(0)


async def ask(port: int, root: Path, own: Issued | None = None) -> str:
    """The server's version, by a connection of its own."""
    files = [None if file is None else file.read_bytes() for file in (root, *reversed(own or (None, None)))]
    credentials = grpc.ssl_channel_credentials(*files)
    async with aio.secure_channel(
        f"localhost:{port}", credentials, [("grpc.use_local_subchannel_pool", 1)]
    ) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        return (await stub.GetServerInfo(inference_pb2.GetServerInfoRequest(), timeout=5)).version


@pytest.mark.parametrize("anew", [False, True], ids=["the same listener", "listening anew"])
async def test_a_changed_certificate_is_shown_to_the_next_connection(anew, authority, tmp_path):
    first, other = authority.issue("first"), Authority(tmp_path / "other")
    files = [Path(shutil.copy(file, tmp_path)) for file in first]
    certificates = Certificates(*files, None)
    async with serving(certificates) as server:
        if anew:
            await server.renew()
        assert await ask(server.port, authority.root)
        with pytest.raises(aio.AioRpcError, match="CERTIFICATE_VERIFY_FAILED"):
            await ask(server.port, other.root)
        for file, new in zip(files, other.issue("second"), strict=True):
            shutil.copy(new, file)
        certificates.look()
        assert await ask(server.port, other.root)
        with pytest.raises(aio.AioRpcError, match="CERTIFICATE_VERIFY_FAILED"):
            await ask(server.port, authority.root)


async def test_with_client_roots_only_their_clients_are_served(authority, tmp_path):
    served = authority.issue("server")
    stranger = Authority(tmp_path / "other").issue("stranger")
    async with serving(Certificates(*served, authority.root)) as server:
        assert await ask(server.port, authority.root, authority.issue("client"))
        for own in (None, stranger):
            with pytest.raises(aio.AioRpcError) as caught:
                await ask(server.port, authority.root, own)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_plain_text_does_not_get_through(authority):
    async with (
        serving(Certificates(*authority.issue("server"), None)) as server,
        aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        with pytest.raises(aio.AioRpcError) as caught:
            await stub.GetServerInfo(inference_pb2.GetServerInfoRequest(), timeout=5)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
