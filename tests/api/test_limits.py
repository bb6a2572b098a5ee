"""How much a request may be: limits that follow the context, held before anything is parsed."""

import grpc
import msgspec
import pytest
from google.protobuf.message import DecodeError
from grpc import aio
from hypothesis import given
from hypothesis import strategies as st

from longspan.v1 import inference_pb2
from server.api import field_count
from server.api.field_count import has_more_fields
from server.api.limits import limits, most_fields
from server.settings import Settings
from tests.api.conftest import INVALID, ask, call_raw, details
from tests.api.fake_engine import READY


def ready(context):
    """Of an engine with a context of so many tokens."""
    return msgspec.structs.replace(READY, context_length=context)


async def test_a_message_that_is_too_large_is_not_parsed(running):
    limit = running.state.limits.request_bytes
    assert limit < 400_000, "it follows the context"
    error = await call_raw(running, "Generate", b"\xff" * (limit + 1))
    assert error.code() is INVALID
    info = details(error)["ErrorInfo"]
    assert info.reason == "REQUEST_TOO_LARGE"
    assert dict(info.metadata) == {"limit": str(limit), "actual": str(limit + 1)}
    assert (
        details(await call_raw(running, "Generate", b"\xff" * limit))["ErrorInfo"].reason
        == "MALFORMED_REQUEST"
    )
    with pytest.raises(aio.AioRpcError) as caught:
        await running.generate("x" * (9 << 20))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await running.generate()


async def test_fields_are_counted_before_they_are_parsed(running, monkeypatch):
    most = most_fields(running.state.limits)
    chat = {"messages": [{"role": "user", "content": "x"}] * 200}
    assert len(chat["messages"]) == running.state.limits.chat_messages
    full = ask(None, chat=chat, sampling={"logit_bias": dict.fromkeys(range(300), 1.0)})
    assert not has_more_fields(full.SerializeToString(), full.DESCRIPTOR, most)
    monkeypatch.setattr(inference_pb2.TokenizeRequest, "FromString", None)
    error = await call_raw(running, "Tokenize", b"\x0a\x00" * 40_000)
    assert details(error)["ErrorInfo"].reason == "TOO_MANY_FIELDS"


def test_biases_are_too_many_by_their_bytes(monkeypatch):
    """Counting 3408 of them one by one took the event loop some milliseconds for each such message."""
    steps = []

    def counted(*arguments, varint=field_count._varint):
        steps.append(arguments)
        return varint(*arguments)

    monkeypatch.setattr(field_count, "_varint", counted)
    payload = ask("x", sampling={"logit_bias": dict.fromkeys(range(49_152), 1.0)})
    assert has_more_fields(payload.SerializeToString(), payload.DESCRIPTOR, 3408)
    assert len(steps) <= 2
    longest = {2**32 - 1 - i: -1.5 for i in range(3400)}
    payload = ask("x", sampling={"logit_bias": longest, "temperature": 0.5, "seed": 2**64 - 1})
    assert not has_more_fields(payload.SerializeToString(), payload.DESCRIPTOR, 3408)


def _field(number, payload):
    size = len(payload)
    length = bytes([size & 0x7F | 0x80, size >> 7 & 0x7F | 0x80, size >> 14])
    return bytes([number << 3 | 2]) + length + payload


@pytest.mark.parametrize(
    "hidden", ["behind a group", "inside a group", "before a bad tag", "in an inner message"]
)
def test_nothing_hides_fields_from_the_count(hidden):
    """The parser skips groups, which no message here has, and builds all fields that precede a bad tag."""
    chat = inference_pb2.GenerateRequest.DESCRIPTOR.fields_by_name["chat"]
    messages = chat.message_type.fields_by_name["messages"]
    many = _field(chat.number, _field(messages.number, b"") * 3000)
    group = bytes([15 << 3 | 3, 15 << 3 | 4])
    inner = inference_pb2.StreamGenerateRequest.DESCRIPTOR.fields_by_name["request"]
    payload, type_ = {
        "behind a group": (group + many, inference_pb2.GenerateRequest),
        "inside a group": (
            _field(chat.number, group + _field(messages.number, b"") * 3000),
            inference_pb2.GenerateRequest,
        ),
        "before a bad tag": (many + b"\x07", inference_pb2.GenerateRequest),
        "in an inner message": (_field(inner.number, many) + b"\x07", inference_pb2.StreamGenerateRequest),
    }[hidden]
    assert has_more_fields(payload, type_.DESCRIPTOR, 2999)
    assert not has_more_fields(payload, type_.DESCRIPTOR, 3010)


@given(st.binary(max_size=200), st.integers(0, 50))
def test_any_bytes_are_counted(payload, most):
    more = has_more_fields(payload, inference_pb2.GenerateRequest.DESCRIPTOR, most)
    try:
        parsed = inference_pb2.GenerateRequest.FromString(payload)
    except DecodeError:
        return
    fields = len(parsed.chat.messages) + len(parsed.stop.stop_strings) + len(parsed.sampling.logit_bias)
    assert more or fields <= most


def test_limits_follow_the_context():
    small, large, huge = (limits(Settings(), ready(context), 32) for context in (2048, 65536, 1 << 24))
    assert (small.text_bytes, large.text_bytes) == (256 << 10, 2 << 20)
    assert small.request_bytes < large.request_bytes < huge.request_bytes == huge.text_bytes == 8 << 20
    raised = limits(Settings(max_request_bytes="32MiB"), ready(2048), 16)
    assert raised.request_bytes == raised.text_bytes == 32 << 20


@pytest.mark.parametrize("kind", ["text", "ids", "chat"])
def test_the_largest_requests_within_the_limits_fit_a_message(kind):
    context = 4096
    limit = limits(Settings(), ready(context), 32)
    id_ = 2**32 - 1
    size = limit.text_bytes // limit.chat_messages
    prompt = {
        "text": {"text": "x" * limit.text_bytes},
        "ids": {"token_ids": {"ids": [id_] * context}},
        "chat": {"chat": {"messages": [{"role": "user", "content": "x" * (size - 4)}] * limit.chat_messages}},
    }[kind]
    request = inference_pb2.GenerateRequest(
        **prompt,
        forced_token_ids=[id_] * context,
        sampling={"logit_bias": {id_ - i: 1.0 for i in range(limit.logit_bias)}},
        stop={
            "stop_strings": ["x" * limit.stop_string_bytes] * limit.stop_strings,
            "stop_token_ids": [id_] * limit.stop_token_ids,
        },
        request_id="x" * 128,
    )
    payload = request.SerializeToString()
    assert len(payload) <= limit.request_bytes
    assert not has_more_fields(payload, request.DESCRIPTOR, most_fields(limit))
