"""Vectors of all tokens are bounded for a request and for all in flight."""

import asyncio
import socket

import grpc
import pytest
from grpc import aio

from longspan.v1 import encoder_pb2, encoder_pb2_grpc
from server.api import stall
from server.api.encoder_service import EncoderServicer
from server.api.errors import ServiceError
from server.api.vector_bytes import VectorBytes
from tests.api.conftest import until
from tests.e2e import http2

MIB = 1 << 20


async def test_all_requests_together_have_a_bound_until_their_answers_are_sent():
    held, sent = VectorBytes(64 * MIB), asyncio.Event()

    async def serve(size, holder):
        held.hold(size, holder)
        await sent.wait()

    async def refused(size, holder):
        with pytest.raises(ServiceError) as caught:
            await asyncio.create_task(serve(size, holder))
        assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert caught.value.reason == "VECTOR_BYTES"
        return caught.value.message

    first = [asyncio.create_task(serve(16 * MIB, holder)) for holder in "abc"]
    first.append(asyncio.create_task(serve(0, "a")))
    await asyncio.sleep(0)
    sentence = await refused(1, "a")
    assert f"of this caller wait for {16 * MIB} bytes" in sentence
    assert f"this one asks for 1, and {16 * MIB} are the most of one" in sentence
    first.append(asyncio.create_task(serve(12 * MIB, "d")))
    await asyncio.sleep(0)
    sentence = await refused(4 * MIB + 1, "e")
    assert f"wait for {60 * MIB} bytes" in sentence
    assert f"this one asks for {4 * MIB + 1}, and {64 * MIB} are the most" in sentence
    last = asyncio.create_task(serve(4 * MIB, "e"))
    first[0].cancel()
    await asyncio.wait(first[:1])
    sent.set()
    await asyncio.gather(*first[1:], last)
    for _ in range(3):
        await asyncio.gather(*(serve(16 * MIB, holder) for holder in "abcd"))
        await asyncio.sleep(0)
    assert not held._held_by, "nothing is kept of those that have ended"


async def test_one_request_has_a_bound():
    with pytest.raises(ServiceError) as caught:
        VectorBytes().hold(16 * MIB + 1, "a")
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert f"asks for {16 * MIB + 1} bytes of vectors; at most {16 * MIB} are sent" in caught.value.message
    assert "fewer or shorter texts" in caught.value.message, "a long text alone can be too much"


async def test_an_answer_that_is_not_read_counts_as_long_as_grpc_keeps_it():
    held, returned = VectorBytes(), []

    async def answer(payload, context):
        held.hold(MIB, "a")
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
        self._state.vector_bytes.hold(MIB, context.peer())
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
