"""Hostile fields in requests of other protocols, made as those of the long run, before the fake engine."""

from __future__ import annotations

import random

import grpc
import pytest
from grpc import aio
from smg_grpc_proto import vllm_engine_pb2
from tritonclient.grpc import service_pb2

from server.settings import Settings
from tests.soak.inputs import hostile_fields

INPUT = {"name": "text_input", "datatype": "BYTES", "shape": [1], "contents": {"bytes_contents": [b"hi"]}}
MAX_TOKENS = {"max_tokens": service_pb2.InferParameter(int64_param=2)}
# What a request is without its hostile field, so that the field is reached.
VALID = {
    "vllm.grpc.engine.GenerateRequest": vllm_engine_pb2.GenerateRequest(
        tokenized={"input_ids": [5, 6]}, sampling_params={"max_tokens": 2}
    ),
    "vllm.grpc.engine.EmbedRequest": vllm_engine_pb2.EmbedRequest(tokenized={"input_ids": [5, 6]}),
    "inference.ModelInferRequest": service_pb2.ModelInferRequest(inputs=[INPUT], parameters=MAX_TOKENS),
}
SERVICES = {
    "vllm": vllm_engine_pb2.DESCRIPTOR.services_by_name["VllmEngine"],
    "kserve": service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"],
}


@pytest.fixture
def settings():
    return Settings(max_running=4, max_queue=4, max_n=4, max_stop_strings=3, protocols="vllm,kserve")


@pytest.mark.parametrize("protocol", SERVICES)
@pytest.mark.parametrize("rounds", [1, pytest.param(4, marks=pytest.mark.stress)])
async def test_no_field_of_a_request_ends_in_a_bug(running, protocol, rounds):
    """Each field of every request; a bug would be INTERNAL, or UNKNOWN past the interceptor."""
    codes = set()
    for payload, method in hostile_fields(random.Random(1), SERVICES[protocol], VALID, rounds):
        call = running.channel.stream_stream(f"/{method.containing_service.full_name}/{method.name}")
        answers, code = [], grpc.StatusCode.OK
        try:
            answers = [answer async for answer in call(iter([payload]), timeout=20)]
        except aio.AioRpcError as error:
            code = error.code()
        codes.add(code)
        what = method.full_name, payload[:200]
        assert code not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN), what
        assert not any(b"[INTERNAL]" in answer for answer in answers), what
    assert {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT} <= codes
