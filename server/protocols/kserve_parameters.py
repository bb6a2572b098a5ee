"""Sampling parameters of a KServe request, by vLLM's names: a JSON object, or parameters of the request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from longspan.v1 import inference_pb2, types_pb2
from server.api.checks import refuse
from server.api.errors import Violation, quote

INPUT = "sampling_parameters"
"""The input that has them."""

_MOST_BYTES = 64 << 10
# Those of Triton's own.
_RESERVED = {
    "sequence_id": "this server keeps no sequences of requests; leave it out",
    "sequence_start": "this server keeps no sequences of requests; leave it out",
    "sequence_end": "this server keeps no sequences of requests; leave it out",
    "priority": "requests of this protocol have priority 0; leave it out",
    "timeout": "set the deadline of the call instead (client_timeout)",
}
# Every last response says that it is the last, so that there is nothing to add.
_FINAL = "triton_enable_empty_final_response"

_UInt32 = Annotated[int, Meta(ge=0, lt=2**32)]


class _Parameters(msgspec.Struct, frozen=True):
    """Unset ones take what the model's makers recommend, as in Longspan's own requests."""

    temperature: float | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=2**32)] | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    logit_bias: dict[_UInt32, float] = {}
    max_tokens: _UInt32 | None = None
    min_tokens: _UInt32 | None = None
    stop: str | list[str] = []
    stop_token_ids: list[_UInt32] = []
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    n: _UInt32 = 1


def apply_parameters(
    text: bytes | None, beside: Mapping[str, Any], request: inference_pb2.GenerateRequest
) -> None:
    """Sets the fields of a request.

    Args:
        text: of the input, if it was sent.
        beside: parameters of the request, as messages.
        request: to be filled in.

    Raises:
        ServiceError: the parameters at fault.
    """
    given = _scalars(beside)
    for name, value in _object(text).items():
        if name in given and str(given[name]) != str(value):
            sentence = f"has {quote(name)} with another value than {INPUT}; send it once"
            refuse([Violation("parameters", sentence)])
        given[name] = value
    names = _Parameters.__struct_fields__
    refuse(
        Violation(INPUT, f"has {quote(name)}, which is no parameter here; those are {', '.join(names)}")
        for name in given
        if name not in names
    )
    try:
        # Not strict: clients send numbers as texts, and Triton's own example does.
        parameters = msgspec.convert(given, _Parameters, strict=False)
    except msgspec.ValidationError as error:
        refuse([Violation(INPUT, f"{error}".replace("$.", "").replace("`", ""))])
        raise
    _fill(parameters, request)


def _fill(given: _Parameters, request: inference_pb2.GenerateRequest) -> None:
    request.sampling.CopyFrom(
        types_pb2.SamplingParams(
            temperature=given.temperature,
            top_k=None if given.top_k is None else max(given.top_k, 0),  # vLLM's -1 keeps all, too
            top_p=given.top_p,
            min_p=given.min_p,
            repetition_penalty=given.repetition_penalty,
            presence_penalty=given.presence_penalty,
            frequency_penalty=given.frequency_penalty,
            seed=None if given.seed is None else given.seed % 2**64,
            logit_bias=given.logit_bias,
        )
    )
    request.stop.CopyFrom(
        types_pb2.StopConditions(
            max_tokens=given.max_tokens,
            min_tokens=given.min_tokens,
            stop_strings=[given.stop] if isinstance(given.stop, str) else given.stop,
            stop_token_ids=given.stop_token_ids,
            ignore_eos=given.ignore_eos,
            include_stop_string=given.include_stop_str_in_output,
        )
    )
    request.keep_special_tokens = not given.skip_special_tokens
    request.n = given.n


def _object(text: bytes | None) -> dict[str, Any]:
    if not text:
        return {}
    if len(text) > _MOST_BYTES:
        refuse([Violation(INPUT, f"has {len(text)} bytes; at most {_MOST_BYTES} are taken")])
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        refuse([Violation(INPUT, f"is no JSON object: {error}")])
        raise


def _scalars(beside: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, parameter in beside.items():
        if name == _FINAL:
            continue
        if name in _RESERVED:
            refuse([Violation(f"parameters[{name}]", _RESERVED[name])])
        kind = parameter.WhichOneof("parameter_choice")
        if kind is None:
            refuse([Violation("parameters", f"has {quote(name)} without a value")])
            continue
        found[name] = getattr(parameter, kind)
    return found
