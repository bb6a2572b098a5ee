"""Vectors of all tokens are bounded for a request and for all in flight."""

import asyncio
import socket

import grpc
import pytest
from grpc import aio

from longspan.v1 import encoder_pb2, encoder_pb2_grpc
from server.api import stall
from server.api.client_faults import of_client
from server.api.encoder_service import EncoderServicer
from server.api.errors import ServiceError
from server.api.vector_bytes import Holder, VectorBytes
from tests.api.conftest import until
from tests.e2e import http2

MIB = 1 << 20


@pytest.fixture
def held():
    return VectorBytes(64 * MIB)


@pytest.fixture
async def hold(held):
    """Has a task hold vectors until the test ends, or tells with what sentence it is refused."""
    sent, tasks = asyncio.Event(), []

    async def serve(size, holder):
        held.hold(size, holder)
        await sent.wait()

    async def hold(size, holder):
        task = asyncio.create_task(serve(size, holder))
        await asyncio.sleep(0)
        if task.done():
            error = task.exception()
            assert isinstance(error, ServiceError)
            assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert error.reason == "VECTOR_BYTES"
            assert of_client(error.code, error), "or callers could make a server look as if it failed"
            return error.message
        tasks.append(task)
        return task

    yield hold
    sent.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(0)
    assert not held._held_by, "nothing is kept of those that have ended"
    assert held._held == 0


async def test_each_caller_has_a_quarter_of_what_others_leave(hold):
    a, b = Holder("a"), Holder("b")
    first = await hold(16 * MIB, a)
    await hold(0, a)
    sentence = await hold(1, a)
    assert f"of this caller wait for {16 * MIB} bytes" in sentence
    assert f"this one asks for 1, and {16 * MIB} are the most" in sentence
    await hold(12 * MIB, b)
    assert f"{12 * MIB} are the most" in await hold(1, b)
    first.cancel()
    await asyncio.wait([first])
    await hold(4 * MIB, b)
    assert f"{16 * MIB} are the most" in await hold(1, b)


async def test_callers_that_read_nothing_leave_something_to_others(hold, held):
    for number in range(8):
        while not isinstance(await hold(MIB // 4, Holder(f"{number}")), str):
            pass
    assert 6 * MIB < 64 * MIB - held._held < 12 * MIB
    assert not isinstance(await hold(MIB, Holder("other")), str)


async def test_connections_of_one_address_leave_half_to_others(hold, held):
    sentences = [
        await hold(MIB, Holder.of("", f"ipv4:192.0.2.1:{port}")) for port in range(20) for _ in range(16)
    ]
    assert held._held == 32 * MIB
    assert f"of this caller's address wait for {32 * MIB} bytes" in sentences[-1]
    assert not isinstance(await hold(8 * MIB, Holder.of("", "ipv6:%5B2001:db8::1%5D:1")), str)
    assert not isinstance(await hold(MIB, Holder.of("an identity", "ipv4:192.0.2.1:1")), str)


async def test_one_request_has_a_bound():
    with pytest.raises(ServiceError) as caught:
        VectorBytes().hold(16 * MIB + 1, Holder("a"))
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert f"asks for {16 * MIB + 1} bytes of vectors; at most {16 * MIB} are sent" in caught.value.message
    assert "fewer or shorter texts" in caught.value.message, "a long text alone can be too much"


async def test_an_answer_that_is_not_read_counts_as_long_as_grpc_keeps_it():
    held, returned = VectorBytes(), []

    async def answer(payload, context):
        held.hold(MIB, Holder("a"))
        returned.append(payload)
        return bytes(MIB)

    class Handler(grpc.GenericRpcHandler):
        def service(self, _):
            return grpc.unary_unary_rpc_method_handler(answer)

    server = aio.server(handlers=[Handler()])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    # It takes 64 KiB, as HTTP/2 has it, until it says that it takes more.
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(http2.BEGIN + b"".join(http2.call(stream, b"/a/B") for stream in (1, 3, 5)))
        await until(lambda: len(returned) == 3)
        await asyncio.sleep(0.2)
        assert held._held == 3 * MIB
    await until(lambda: held._held == 0)
    await server.stop(0)


@pytest.fixture
def large_answers(monkeypatch):
    """Answers of ``Embed`` have 3 MB, without a model."""

    async def embed(self, request, context):
        self._state.vector_bytes.hold(MIB, Holder.of("", context.peer()))
        return encoder_pb2.EmbedResponse(embeddings=[encoder_pb2.Embedding(values=[1.0] * 750_000)])

    monkeypatch.setattr(EncoderServicer, "Embed", embed)


async def test_a_call_whose_answer_is_not_read_is_ended(large_answers, loading, monkeypatch, caplog):
    caplog.set_level("INFO", "longspan.server")
    stub = encoder_pb2_grpc.EncoderServiceStub(loading.channel)
    (embedding,) = (await stub.Embed(encoder_pb2.EmbedRequest())).embeddings
    assert len(embedding.values) == 750_000
    monkeypatch.setattr(stall, "SENDING_SECONDS", 0.5)
    held = loading.state.vector_bytes
    path = b"/longspan.v1.EncoderService/Embed"
    with socket.create_connection(("127.0.0.1", loading.port)) as connection:
        connection.sendall(http2.BEGIN + b"".join(http2.call(stream, path) for stream in (1, 3, 5)))
        await until(lambda: held._held == 3 * MIB)
        await until(lambda: held._held == 0)
    assert [record.message for record in caplog.records] == [
        "an answer was not read within 0 s, so its call was ended"
    ] * 3
    assert len((await stub.Embed(encoder_pb2.EmbedRequest())).embeddings) == 1
