"""The Open Inference Protocol before the fake engine, asked by the real tritonclient."""

from __future__ import annotations

import asyncio
import json

import pytest
import tritonclient.grpc.aio as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc as pb_grpc

from tests.api.conftest import until
from tests.api.kserve import client, inputs, refusal, settings, stream, tensor, words

__all__ = ["client", "settings"]


async def test_health_and_metadata(running, client):
    assert await client.is_server_live()
    assert await client.is_server_ready()
    assert await client.is_model_ready("fake")
    assert not await client.is_model_ready("other")
    assert (await client.get_server_metadata()).name == "longspan"
    metadata = await client.get_model_metadata("fake")
    assert [tensor.name for tensor in metadata.outputs] == ["text_output", "finish_reason"]
    config = (await client.get_model_config("fake")).config
    assert config.model_transaction_policy.decoupled
    assert [(one.name, one.optional) for one in config.input][:2] == [("text_input", False), ("stream", True)]
    assert "no model named" in str(await refusal(client.get_model_metadata("other")))
    status = await health_pb2_grpc.HealthStub(running.channel).Check(
        health_pb2.HealthCheckRequest(service="inference.GRPCInferenceService")
    )
    assert status.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_server_that_loads_is_live_and_not_ready(loading):
    async with triton.InferenceServerClient(f"127.0.0.1:{loading.port}") as client:
        assert await client.is_server_live()
        assert not await client.is_server_ready()
        assert not await client.is_model_ready("fake")
        assert "loading" in str(await refusal(client.infer("fake", inputs())))


@pytest.mark.parametrize("n", [1, 3])
async def test_the_text_is_that_of_the_own_service(running, client, n):
    own = await running.generate(n=n)
    result = await client.infer("fake", inputs(parameters={"n": n}), request_id="seven")
    assert words(result) == [completion.text for completion in own.completions]
    assert words(result, "finish_reason") == ["length"] * n
    response = result.get_response()
    assert (response.id, response.model_version) == ("seven", "1")
    assert response.parameters["triton_final_response"].bool_param
    assert running.sample("longspan_requests_total", finish_reason="length", grpc_code="OK") == 2
    first, second = running.engine.submitted[0], running.engine.submitted[n]
    assert first.sampling == second.sampling, "unset parameters are the model's, as in the own service"


async def test_a_stream(running, client):
    text = (await running.generate()).completions[0].text
    answers = await stream(client, {"inputs": inputs(stream=True), "request_id": "9"})
    assert not any(error for _, error in answers)
    results = [result for result, _ in answers]
    assert len(results) > 1
    assert "".join(words(result)[0] for result in results) == text
    assert [words(result, "finish_reason")[0] for result in results] == [""] * (len(results) - 1) + ["length"]
    final = [result.get_response().parameters["triton_final_response"].bool_param for result in results]
    assert final == [False] * (len(results) - 1) + [True]
    (whole,) = await stream(client, {"inputs": inputs()})
    assert words(whole[0]) == [text]


async def test_requests_of_a_stream_are_answered_side_by_side(running, client):
    running.engine.step_seconds = 0.01
    long, short = {"max_tokens": 60}, {"max_tokens": 2}
    answers = await stream(
        client,
        {"inputs": inputs(parameters=long), "request_id": "long"},
        {"inputs": inputs(parameters=short), "request_id": "short"},
    )
    assert [result.get_response().id for result, _ in answers] == ["short", "long"]


async def test_an_error_in_a_stream_is_its_request_s_own(running):
    stub = pb_grpc.GRPCInferenceServiceStub(running.channel)

    def request(name: str, model: str) -> pb.ModelInferRequest:
        made = pb.ModelInferRequest(model_name=model, id=name)
        made.inputs.add(name="text_input", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"hi")
        made.parameters["max_tokens"].int64_param = 2
        return made

    asked = iter([request("a", "other"), request("b", "fake")])
    found = {answer.infer_response.id: answer async for answer in stub.ModelStreamInfer(asked)}
    assert found["a"].error_message.startswith("[NOT_FOUND] this server has no model named 'other'")
    assert found["a"].infer_response.parameters["triton_final_response"].bool_param
    assert not found["b"].error_message
    (text, reason) = found["b"].infer_response.outputs
    assert (len(text.contents.bytes_contents[0]), reason.contents.bytes_contents) == (2, [b"length"])
    rejected = running.sample("longspan_request_rejections_total", reason="model_not_found")
    ended = running.sample("longspan_requests_total", finish_reason="length", grpc_code="OK")
    assert (rejected, ended) == (1, 1), "each request of the stream is counted"


async def test_a_stream_that_is_left_ends_its_requests(running, client):
    running.engine.step_seconds = 0.01

    async def requests():
        for _ in range(3):
            yield {"model_name": "fake", "inputs": inputs(parameters={"max_tokens": 100}, stream=True)}

    answers = client.stream_infer(requests())
    await anext(aiter(answers))
    assert running.engine.running
    answers.cancel()
    await until(lambda: running.engine.running == 0)
    cancelled = {"finish_reason": "none", "grpc_code": "CANCELLED"}
    await until(lambda: running.sample("longspan_requests_total", **cancelled) == 3)


async def test_more_than_the_server_takes(running, client):
    """4 run and 4 wait; the others are told so, each by itself."""
    running.engine.open.clear()

    async def requests():
        for _ in range(10):
            yield {"model_name": "fake", "inputs": inputs()}

    answers = client.stream_infer(requests())
    errors = [str((await anext(answers))[1]) for _ in range(2)]
    assert all("[RESOURCE_EXHAUSTED]" in error for error in errors)
    running.engine.open.set()
    assert [error async for _, error in answers] == [None] * 8


async def test_parameters_of_the_request_as_triton_s_example_sends_them(running, client):
    """As texts, in the tensor and beside it."""
    both = {"temperature": "0.1", "top_p": "0.95", "max_tokens": "3"}
    given = [tensor("text_input", "hello"), tensor("sampling_parameters", json.dumps(both))]
    result = await client.infer("fake", given, parameters=both)
    assert len(words(result)[0]) == 3
    assert running.engine.submitted[0].sampling.top_p == pytest.approx(0.95)
    for name in ("priority", "timeout"):
        assert name in str(await refusal(client.infer("fake", inputs(), **{name: 1})))
    assert "sequences" in str(await refusal(client.infer("fake", inputs(), sequence_id=1)))
    assert "another value" in str(await refusal(client.infer("fake", inputs(), parameters={"max_tokens": 4})))


async def test_the_prompt_comes_first_where_it_is_not_excluded(running, client):
    text = words(await client.infer("fake", inputs()))[0]
    whole = await client.infer("fake", inputs(exclude_input_in_output=False, return_finish_reason=False))
    assert words(whole) == [f"hello{text}"]
    assert whole.as_numpy("finish_reason") is None
    wanted = [triton.InferRequestedOutput("finish_reason")]
    only = await client.infer("fake", inputs(), outputs=wanted)
    assert only.as_numpy("text_output") is None


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_describes_it_under_both_names(running, version):
    """v1's bytes are v1alpha's; the descriptors that it gives are a client's own names."""
    infos = running.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    questions = [
        {"list_services": ""},
        {"file_containing_symbol": "inference.GRPCInferenceService"},
        {"file_containing_symbol": f"grpc.reflection.{version}.ServerReflection"},
    ]
    asked = iter([reflection_pb2.ServerReflectionRequest(**question) for question in questions])
    listed, *files = [answer async for answer in infos(asked)]
    names = {service.name for service in listed.list_services_response.service}
    assert {"inference.GRPCInferenceService", f"grpc.reflection.{version}.ServerReflection"} <= names
    assert all(answer.file_descriptor_response.file_descriptor_proto for answer in files)


async def test_names_of_a_request_that_two_clients_choose_alike(running, client):
    """Triton's ids are its clients' own business: equal ones do not exclude each other, as Longspan's do."""
    both = await asyncio.gather(*(client.infer("fake", inputs(), request_id="0") for _ in range(2)))
    assert [result.get_response().id for result in both] == ["0", "0"]
