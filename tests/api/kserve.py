"""Requests of the Open Inference Protocol, as the real tritonclient makes them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import numpy as np
import pytest
import tritonclient.grpc as sync_triton
import tritonclient.grpc.aio as triton
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import InferenceServerException

from server.settings import Settings

GOOD = {"contents": {"bytes_contents": [b"hi"]}}


@pytest.fixture
def settings():
    return Settings(max_running=4, max_queue=4, max_n=4, max_stop_strings=3, protocols="kserve")


@pytest.fixture
async def client(running):
    async with triton.InferenceServerClient(f"127.0.0.1:{running.port}") as client:
        yield client


def tensor(name: str, value: str | bool) -> sync_triton.InferInput:
    kind, element = ("BOOL", value) if isinstance(value, bool) else ("BYTES", value.encode())
    made = triton.InferInput(name, [1], kind)
    made.set_data_from_numpy(np.array([element], dtype=bool if kind == "BOOL" else object))
    return made


def inputs(text: str = "hello", parameters: dict | None = None, **others: str | bool) -> list:
    given = {"max_tokens": 5, "seed": 0, **(parameters or {})}
    values = {"text_input": text, "sampling_parameters": json.dumps(given), **others}
    return [tensor(name, value) for name, value in values.items()]


def words(result, name: str = "text_output") -> list[str]:
    return [value.decode() for value in result.as_numpy(name)]


async def stream(client, *asked: dict) -> list:
    async def requests() -> AsyncIterator[dict]:
        for one in asked:
            yield {"model_name": "fake", **one}

    return [answer async for answer in client.stream_infer(requests())]


async def refusal(call) -> InferenceServerException:
    with pytest.raises(InferenceServerException) as caught:
        await call
    return caught.value


def with_input(**fields) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="fake")
    request.inputs.add(**{"name": "text_input", "datatype": "BYTES", "shape": [1], **fields})
    return request
