"""Calls through the edge of Ray's proxy to a server without a port; Ray Serve between them is a stand-in."""

import asyncio
import pickle

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from longspan.v1 import inference_pb2, inference_pb2_grpc
from server.ray import loopback
from server.ray.answering import streamed, whole
from server.ray.calls import Calls
from server.ray.edge import _stream, add_services
from server.ray.frames import Frame
from tests.api.conftest import ask, call_raw, details, until


class StandInServe:
    """Does with handlers and calls what Serve's gRPC proxy and its replicas do, in this process.

    Like Serve it swallows the cancellation of a call, and tells failures by a code and a sentence only.

    Attributes:
        lost: the replica ends after so many frames.
        deleted: it has no application.
    """

    def __init__(self, calls):
        self.server = aio.server()
        self.lost = None
        self.deleted = False
        self._calls = calls

    def add_generic_rpc_handlers(self, handlers):
        (edge,) = handlers
        edge._method_handlers = {
            path: handler._replace(unary_unary=self._unary(path), unary_stream=self._stream(path))
            for path, handler in edge._method_handlers.items()
        }
        self.server.add_generic_rpc_handlers(handlers)

    def _given(self, path, payload, context):
        return (
            self._calls,
            path,
            *pickle.loads(pickle.dumps((payload, context.invocation_metadata(), context.peer()))),
        )

    @staticmethod
    def _not_found(context):
        context.set_code(grpc.StatusCode.NOT_FOUND)
        context.set_details("Application metadata not set.")

    def _unary(self, path):
        async def call(payload, context):
            if self.deleted:
                self._not_found(context)
                return None
            if self.lost is not None:
                context.set_code(grpc.StatusCode.INTERNAL)
                context.set_details("The actor died unexpectedly")
                return b""
            try:
                answer = (await whole(*self._given(path, payload, context))).SerializeToString()
            except asyncio.CancelledError:
                context.set_code(grpc.StatusCode.CANCELLED)
                return b""
            context.set_code(grpc.StatusCode.OK)
            return answer

        return call

    def _stream(self, path):
        async def call(payload, context):
            if self.deleted:
                self._not_found(context)
                return
            count = 0
            frames = streamed(*self._given(path, payload, context))
            try:
                async for frame in frames:
                    if count == self.lost:
                        raise RuntimeError("The actor died unexpectedly")
                    count += 1
                    yield frame.SerializeToString()
            except asyncio.CancelledError:
                context.set_code(grpc.StatusCode.CANCELLED)
            except RuntimeError as error:
                context.set_code(grpc.StatusCode.INTERNAL)
                context.set_details(str(error))
            finally:
                await frames.aclose()

        return call


@pytest.fixture
async def through(running):
    """The server ``running``, its stub and channel through the edge."""
    stand_in = StandInServe(Calls(running.server._parts))
    add_services(None, stand_in)
    port = stand_in.server.add_insecure_port("127.0.0.1:0")
    await stand_in.server.start()
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        running.channel = channel
        running.stub = inference_pb2_grpc.InferenceServiceStub(channel)
        running.serve = stand_in
        yield running
    await stand_in.server.stop(0)


async def test_answers_and_headers_are_those_of_a_server_with_a_port(through):
    call = through.stub.Generate(ask(request_id="mine"))
    assert (await call).completions[0].text == "abcde"
    assert ("x-request-id", "mine") in tuple(await call.initial_metadata())
    events = await through.events(ask())
    assert "".join(event.delta.text for event in events) == "abcde"
    health = health_pb2_grpc.HealthStub(through.channel)
    assert (await health.Check(health_pb2.HealthCheckRequest())).status == 1
    info = await through.stub.GetModelInfo(inference_pb2.GetModelInfoRequest())
    assert info.name == "fake"
    assert through.sample("longspan_requests_total", finish_reason="length", grpc_code="OK") == 2


async def test_refusals_come_whole(through):
    error = await through.refused(ask(sampling={"temperature": -1}))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details(error)["BadRequest"].field_violations[0].field == "sampling.temperature"
    error = await call_raw(through, "StreamGenerate", b"\xff\xff")
    assert details(error)["ErrorInfo"].reason == "MALFORMED_REQUEST"
    through.state.phase = "draining"
    error = await through.refused(ask())
    assert (error.code(), details(error)["RetryInfo"].retry_delay.seconds) == (grpc.StatusCode.UNAVAILABLE, 2)
    with pytest.raises(aio.AioRpcError) as watch:
        await health_pb2_grpc.HealthStub(through.channel).Watch(health_pb2.HealthCheckRequest()).read()
    assert watch.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("how", ["cancel", "deadline"])
async def test_a_client_that_leaves_ends_its_request(through, how):
    through.engine.step_seconds = 0.01
    wrapped = inference_pb2.StreamGenerateRequest(request=ask(stop={"max_tokens": 190, "ignore_eos": True}))
    call = through.stub.StreamGenerate(wrapped, timeout=None if how == "cancel" else 0.5)
    if how == "cancel":
        assert (await call.read()).HasField("accepted")
        await until(lambda: through.engine.running == 1)
        call.cancel()
    code = "CANCELLED" if how == "cancel" else "DEADLINE_EXCEEDED"
    await until(lambda: through.sample("longspan_requests_total", finish_reason="none", grpc_code=code) == 1)
    await until(lambda: through.engine.running == 0)


async def test_a_client_that_leaves_while_it_is_written_to_ends_its_request():
    told = []

    class Full:
        """The context of a call whose client makes no room."""

        def invocation_metadata(self):
            return ()

        def time_remaining(self):
            return None

        async def write(self, message):
            await asyncio.Event().wait()

    async def serve(payload, call):
        try:
            yield Frame(messages=[b"x"]).SerializeToString()
            await asyncio.sleep(60)
        except asyncio.CancelledError:  # where Ray cancels the replica's work
            told.append(payload)

    call = asyncio.create_task(_stream(serve)(b"mine", Full()))
    await asyncio.sleep(0.01)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert told == [b"mine"]


@pytest.mark.parametrize("after", [0, 1])
async def test_a_replica_that_dies_ends_its_calls_with_what_to_do(through, after):
    through.serve.lost, through.engine.step_seconds = after, 0.01
    for answer in (through.stub.Generate(ask()), through.events(ask())):
        with pytest.raises(aio.AioRpcError) as lost:
            await answer
        assert lost.value.code() is grpc.StatusCode.UNAVAILABLE
        assert details(lost.value)["ErrorInfo"].reason == "REPLICA_LOST"


async def test_a_server_that_starts_or_drains_is_unavailable(through, monkeypatch):
    """Serve says that there is no application; a client's service config repeats UNAVAILABLE alone."""
    through.serve.deleted = True
    for answer in (through.stub.Generate(ask()), through.events(ask())):
        with pytest.raises(aio.AioRpcError) as unknown:
            await answer
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND  # in a cluster another one may be meant
    for name, value in loopback.environment("127.0.0.1", 1).items():
        monkeypatch.setenv(name, value)
    for answer in (through.stub.Generate(ask()), through.events(ask())):
        with pytest.raises(aio.AioRpcError) as drains:
            await answer
        assert drains.value.code() is grpc.StatusCode.UNAVAILABLE
        assert details(drains.value)["ErrorInfo"].reason == "NO_REPLICA"
        assert details(drains.value)["RetryInfo"].retry_delay.seconds == 2
