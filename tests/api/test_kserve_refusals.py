"""The Open Inference Protocol: wrong and hostile requests are refused by name, and cost little."""

from __future__ import annotations

import tracemalloc
import weakref
from contextlib import aclosing

import pytest
from grpc import aio
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc as pb_grpc
from tritonclient.utils import InferenceServerException

from server.protocols.kserve_request import KserveRequest
from server.protocols.kserve_stream import side_by_side
from tests.api.conftest import INVALID, until
from tests.api.kserve import GOOD, client, inputs, refusal, settings, with_input

__all__ = ["client", "settings"]


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        (
            {"best_of": 2},
            "sampling_parameters: has 'best_of', which is no parameter here; those are temperature",
        ),
        ({"temperature": "hot"}, "sampling_parameters: .* temperature"),
        ({"temperature": -1}, "sampling.temperature: is -1"),
        ({"max_tokens": 2.5}, "sampling_parameters: .* max_tokens"),
        ({"stop": ["a"] * 4}, "stop.stop_strings: has 4"),
    ],
)
async def test_parameters_are_checked(running, client, parameters, sentence):
    with pytest.raises(InferenceServerException, match=sentence):
        await client.infer("fake", inputs(parameters=parameters))
    assert not running.engine.submitted


@pytest.mark.parametrize(
    "text",
    [
        *(
            b"[" * 60_000,
            b'{"a":' * 10_000,
            b"null",
            b"{",
            b'{"stop":"\xff"}',
            b'{"stop":["\\ud800"]}',
            b" " * 70_000,
        ),
        *(b'{"temperature":"nan"}', b'{"temperature":1e39}', b'{"seed":1e400}', b'{"logit_bias":{"-1":2}}'),
    ],
    ids=lambda text: text[:12].decode("latin1"),
)
async def test_hostile_parameters_are_refused(running, text):
    request = with_input(**GOOD)
    tensor = request.inputs.add(name="sampling_parameters", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(text)
    with pytest.raises(aio.AioRpcError) as caught:
        await pb_grpc.GRPCInferenceServiceStub(running.channel).ModelInfer(request)
    assert caught.value.code() is INVALID


def parameter() -> pb.InferParameter:
    return pb.InferParameter(string_param="x")


WRONG = {
    "inputs: has no text_input": pb.ModelInferRequest(model_name="fake"),
    r"inputs\[0\].name: is named 'image'": with_input(**GOOD, name="image"),
    r"inputs\[0\].datatype: is 'INT8'": with_input(**GOOD, datatype="INT8"),
    r"inputs\[0\].shape: is \[2\]": with_input(**GOOD, shape=[2]),
    r"inputs\[0\].parameters: has 'shared_memory_region'": with_input(
        **GOOD, parameters={"shared_memory_region": parameter()}
    ),
    r"inputs\[0\]: text_input does not have exactly one element": with_input(),
    "text_input: is not UTF-8": with_input(contents={"bytes_contents": [b"\xff"]}),
    "raw_input_contents: has 2 entries": pb.ModelInferRequest(
        model_name="fake", inputs=with_input().inputs, raw_input_contents=[b"", b""]
    ),
    r"inputs\[0\]: text_input does not": pb.ModelInferRequest(
        model_name="fake", inputs=with_input().inputs, raw_input_contents=[b"\x09\0\0\0hi"]
    ),
    r"outputs\[0\].name: is named 'logprobs'": pb.ModelInferRequest(
        model_name="fake", inputs=with_input(**GOOD).inputs, outputs=[{"name": "logprobs"}]
    ),
    r"outputs\[0\].parameters: has 'classification'": pb.ModelInferRequest(
        model_name="fake",
        inputs=with_input(**GOOD).inputs,
        outputs=[{"name": "text_output", "parameters": {"classification": parameter()}}],
    ),
    "shape: is of 100000 dimensions": with_input(**{**GOOD, "shape": [1, 2] * 50_000}),
    "id: has 1025 characters": pb.ModelInferRequest(
        model_name="fake", id="x" * 1025, inputs=with_input(**GOOD).inputs
    ),
    "model_version: is '2'": pb.ModelInferRequest(
        model_name="fake", model_version="2", inputs=with_input(**GOOD).inputs
    ),
}


@pytest.mark.parametrize("sentence", WRONG)
async def test_what_it_cannot_do_is_refused_by_name(running, sentence):
    with pytest.raises(aio.AioRpcError, match=f"^[^|]*{sentence}"):
        await pb_grpc.GRPCInferenceServiceStub(running.channel).ModelInfer(WRONG[sentence])
    assert not running.engine.submitted


async def test_a_unary_call_does_not_stream(running, client):
    assert "ModelStreamInfer streams" in str(await refusal(client.infer("fake", inputs(stream=True))))


async def test_a_request_for_many_samples_makes_none_before_it_is_checked():
    async def events():
        raise ValueError("n is refused")
        yield

    asked = KserveRequest(with_input(**GOOD), streams=False)
    asked.own.n = 100_000
    tracemalloc.start()
    with pytest.raises(ValueError, match="refused"):
        await anext(asked.responses(events(), "fake"))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 100_000


async def test_refused_requests_of_a_stream_that_is_not_read_are_not_kept(running):
    """Their bytes could fill the memory: 64 of each stream wait for the client to read why."""

    class Request:
        pass

    asked = [Request() for _ in range(8)]
    kept = weakref.WeakSet(asked)

    async def requests():
        while asked:
            yield asked.pop()

    async def refuse(request):
        del request
        for _ in range(4):
            yield "refused"

    async with aclosing(side_by_side(requests(), refuse)) as answers:
        await anext(answers)
        await until(lambda: len(kept) <= 1)  # the one read last


async def test_what_it_lacks_is_unimplemented_with_a_sentence(running, client):
    error = await refusal(client.get_inference_statistics("fake"))
    assert error.status() == "StatusCode.UNIMPLEMENTED"
    assert "docs/protocols.md" in error.message()
