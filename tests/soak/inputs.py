"""Hostile inputs: every field of every request with values that no client sends, and bytes of no message.

They come from the descriptors, so that a field that is added to the proto is tried without a line here.
"""

from __future__ import annotations

import itertools
import random
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from longspan.v1 import encoder_pb2, inference_pb2
from tests import wire_format
from tests.wire_format import field, varint

# Large enough that sizes are tried, small enough that a run sends thousands of messages a minute.
_MOST_BYTES = 1 << 18

_SERVICES = (
    *inference_pb2.DESCRIPTOR.services_by_name.values(),
    *encoder_pb2.DESCRIPTOR.services_by_name.values(),
    *reflection_pb2.DESCRIPTOR.services_by_name.values(),
    *health_pb2.DESCRIPTOR.services_by_name.values(),
)
_PROMPT = inference_pb2.GenerateRequest(text="hello", stop={"max_tokens": 2})
# What a message is without its hostile field: valid, so that the field is reached, and cheap if it is taken.
_VALID: dict[str, Message] = {
    "GenerateRequest": _PROMPT,
    "StreamGenerateRequest": inference_pb2.StreamGenerateRequest(request=_PROMPT),
    "AbortRequest": inference_pb2.AbortRequest(request_id="none"),
    "TokenizeRequest": inference_pb2.TokenizeRequest(text="hello"),
    "DetokenizeRequest": inference_pb2.DetokenizeRequest(token_ids=[5, 6]),
    "CountTokensRequest": inference_pb2.CountTokensRequest(text="hello"),
    "EmbedRequest": encoder_pb2.EmbedRequest(texts=["hello"]),
    "ScoreRequest": encoder_pb2.ScoreRequest(inputs=[{"text": "hello", "pair": "there"}]),
    "FillMaskRequest": encoder_pb2.FillMaskRequest(texts=["hello [MASK]"]),
}
COUNTED = (
    *("Generate", "StreamGenerate"),
    *(method.name for method in encoder_pb2.DESCRIPTOR.services_by_name["EncoderService"].methods),
)
"""Methods whose calls ``requests_total`` counts."""

_INTEGERS = (
    *(0, 1, 2, 127, 128, 300, 49_151, 49_152, 65_535, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63),
    *(2**64 - 1, -1, -2, -(2**31), -(2**63)),
)
_FLOATS = (
    *(0.0, -0.0, 1.0, -1.0, 1e-45, 1e-30, 0.01, 1.0000001, 2.0, 100.0, 3.4028234e38, -3.4028234e38),
    *(float("nan"), float("inf"), float("-inf")),
)
_TEXTS = (
    *(b"", b"\0", b" ", b"a", b"\n" * 500, b"\xff\xfe", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf4\x90\x80\x80"),
    *(b"\xe2\x82", "\ufeff\u202e\u2066".encode(), ("e" + "\u0301" * 400).encode(), b"../../etc/passwd"),
    *("\U0001f469\u200d" * 300).encode().split(b"\0"),
    *(b"<|im_start|>system\n", b"<|im_end|>" * 40, b"{{ ''.__class__ }}", b"%s%n\r\nx: y", b"a" * 65_536),
)
_COUNTS = (1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 17, 17, 300, 1_100, 1_100, 20_000)
_FIXED = {FieldDescriptor.TYPE_FLOAT: "<f", FieldDescriptor.TYPE_DOUBLE: "<d"}
_OF_BYTES = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES, FieldDescriptor.TYPE_MESSAGE)


class Input(NamedTuple):
    """One input.

    Attributes:
        method: its path; empty where the bytes are for the port itself.
        kind: how it was made: ``field``, ``mutated``, ``random`` or ``connection``.
        field: the hostile field's path, or empty.
        payload: the bytes.
        known: whether it is sent with a token.
    """

    method: str
    kind: str
    field: str
    payload: bytes
    known: bool = True


class _Case(NamedTuple):
    method: str
    request: str
    path: tuple[FieldDescriptor, ...]

    @property
    def name(self) -> str:
        return ".".join((self.request, *(step.name for step in self.path)))


def _methods() -> Iterator[MethodDescriptor]:
    for service in _SERVICES:
        for method in service.methods:
            if method.full_name != "grpc.health.v1.Health.Watch":  # it is meant not to end
                yield method


def _paths(message: Descriptor, before: tuple[FieldDescriptor, ...] = ()) -> Iterator[Any]:
    for each in message.fields:
        yield (*before, each)
        if each.message_type is not None:
            yield from _paths(each.message_type, (*before, each))


def _cases() -> list[_Case]:
    return [
        _Case(_call(method), method.input_type.name, path)
        for method in _methods()
        for path in _paths(method.input_type)
    ]


def _call(method: MethodDescriptor) -> str:
    return f"/{method.containing_service.full_name}/{method.name}"


FIELDS = frozenset(case.name for case in _cases())
"""The path of every field of every request, from the request's name."""


def inputs(rng: random.Random) -> Iterator[Input]:
    """Endless inputs. Those of kind ``field`` visit every field before they visit one again."""
    cases = _cases()
    rng.shuffle(cases)
    walk = itertools.cycle(cases)
    makers: list[Callable[[], Input]] = [
        lambda: _hostile_field(rng, next(walk)),
        lambda: _mutated(rng, next(walk)),
        lambda: Input(rng.choice(cases).method, "random", "", _random_bytes(rng)),
        lambda: Input("", "connection", "", _connection_bytes(rng)),
    ]
    while True:
        made = rng.choices(makers, (60, 25, 13, 2))[0]()
        yield made._replace(known=rng.random() >= 0.04)


def hostile_fields(
    rng: random.Random, service: ServiceDescriptor, valid: Mapping[str, Message], rounds: int
) -> Iterator[tuple[bytes, MethodDescriptor]]:
    """Requests of another service, each with one hostile field: so many for each field of every request.

    Args:
        rng: draws them.
        service: whose.
        valid: by full names of messages, what they are without that field.
        rounds: how many.
    """
    for _ in range(rounds):
        for method in service.methods:
            before = valid.get(method.input_type.full_name)
            for path in _paths(method.input_type):
                made = _hostile_field(rng, _Case("", "", path)).payload
                yield (b"" if before is None else before.SerializeToString()) + made, method


def _valid(request: str) -> bytes:
    message = _VALID.get(request)
    return b"" if message is None else message.SerializeToString()


def _hostile_field(rng: random.Random, case: _Case) -> Input:
    encoded = _field(rng, case.path[-1])
    for step in reversed(case.path[:-1]):
        if rng.random() < 0.1:
            encoded += _unknown(rng)
        encoded = field(step.number, encoded)
    payload = _valid(case.request) + encoded
    if rng.random() < 0.05:
        payload = payload[: rng.randrange(len(payload))]
    return Input(case.method, "field", case.name, payload)


def _field(rng: random.Random, descriptor: FieldDescriptor) -> bytes:
    if rng.random() < 0.05:
        return _unknown(rng, descriptor.number)  # its number, with another type
    count = rng.choice(_COUNTS)
    block = b"".join(_value(rng, descriptor) for _ in range(min(count, 17)))
    return (block * min(count // 17, _MOST_BYTES // len(block)))[:_MOST_BYTES] or block


def _value(rng: random.Random, descriptor: FieldDescriptor) -> bytes:
    number, kind = descriptor.number, descriptor.type
    if kind in _FIXED:
        form = _FIXED[kind]
        wire = wire_format.FIXED32 if form == "<f" else wire_format.FIXED64
        bits = rng.randbytes(struct.calcsize(form))
        return field(number, bits if rng.random() < 0.2 else struct.pack(form, rng.choice(_FLOATS)), wire)
    if kind == FieldDescriptor.TYPE_MESSAGE:
        content = rng.choice((b"", _unknown(rng), rng.randbytes(rng.randrange(1, 40))))
        return field(number, content)
    if kind in _OF_BYTES:
        text = rng.choice(_TEXTS)
        return field(number, text if rng.random() < 0.9 else rng.randbytes(rng.randrange(200)))
    if descriptor.is_repeated and rng.random() < 0.5:  # packed
        return field(number, b"".join(varint(rng.choice(_INTEGERS)) for _ in range(rng.choice(_COUNTS))))
    value = rng.choice(_INTEGERS) if rng.random() < 0.8 else rng.getrandbits(rng.randrange(1, 65))
    return field(number, b"\xff" * 10 + b"\1" if rng.random() < 0.03 else varint(value), wire_format.VARINT)


def _unknown(rng: random.Random, number: int | None = None) -> bytes:
    """A field that the message does not have, or not in this form."""
    number = number or rng.choice((0, 15, 16, 999, 19_000, 2**29 - 1, 2**29))
    kind = rng.randrange(8)
    sizes = {wire_format.VARINT: 1, wire_format.FIXED64: 8, wire_format.FIXED32: 4}
    return field(number, rng.randbytes(sizes.get(kind, rng.randrange(20))), kind)


def _mutated(rng: random.Random, case: _Case) -> Input:
    source = _hostile_field(rng, case).payload if rng.random() < 0.5 else _valid(case.request)
    changed = bytearray(source[:4096] or b"\0")
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(changed))
        match rng.randrange(4):
            case 0:
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                changed[at:at] = rng.randbytes(rng.randrange(1, 5))
            case 2:
                changed[at:at] = changed[at : at + rng.randrange(1, 65)]
            case _:
                del changed[at : at + rng.randrange(1, 9)]
                changed = changed or bytearray(1)
    return Input(case.method, "mutated", "", bytes(changed))


def _random_bytes(rng: random.Random) -> bytes:
    return rng.randbytes(int(2 ** rng.uniform(0, 14)) - 1)


def _connection_bytes(rng: random.Random) -> bytes:
    begin = rng.choice(
        (b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET /metrics HTTP/1.1\r\n", b"\x16\x03\x01")
    )
    return begin + _random_bytes(rng)
