"""Vectors of all tokens are bounded for a request and for all in flight."""

import asyncio
import socket

import grpc
import pytest
from grpc import aio

from server.api.errors import ServiceError
from server.api.vector_bytes import VectorBytes
from tests.api.conftest import until
from tests.e2e import http2

MIB = 1 << 20


async def test_all_requests_together_have_a_bound_until_their_answers_are_sent():
    held, sent = VectorBytes(40 * MIB), asyncio.Event()

    async def serve(size):
        held.hold(size)
        await sent.wait()

    first = [asyncio.create_task(serve(size)) for size in (16 * MIB, 0, 16 * MIB)]
    await asyncio.sleep(0)
    with pytest.raises(ServiceError) as caught:
        await asyncio.create_task(serve(8 * MIB + 1))
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert caught.value.reason == "VECTOR_BYTES"
    assert f"wait for {32 * MIB} bytes" in caught.value.message
    assert f"this one asks for {8 * MIB + 1}, and {40 * MIB} are the most" in caught.value.message
    last = asyncio.create_task(serve(8 * MIB))
    first[0].cancel()
    await asyncio.wait(first[:1])
    sent.set()
    await asyncio.gather(*first[1:], last)
    for _ in range(3):
        await asyncio.gather(serve(16 * MIB), serve(16 * MIB), serve(8 * MIB))
        await asyncio.sleep(0)


async def test_one_request_has_a_bound():
    with pytest.raises(ServiceError) as caught:
        VectorBytes().hold(16 * MIB + 1)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert f"asks for {16 * MIB + 1} bytes of vectors; at most {16 * MIB} are sent" in caught.value.message
    assert "fewer or shorter texts" in caught.value.message, "a long text alone can be too much"


async def test_an_answer_that_is_not_read_counts_as_long_as_grpc_keeps_it():
    held, returned = VectorBytes(), []

    async def answer(payload, context):
        held.hold(MIB)
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
