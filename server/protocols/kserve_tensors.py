"""Tensors of the Open Inference Protocol: read in either form, written in that of the request."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence

from tritonclient.grpc import service_pb2 as pb

from server.api.checks import refuse
from server.api.errors import Violation, quote

# A text before its bytes, as in Triton's binary form.
_LENGTH = struct.Struct("<I")
# Dimensions of a shape that a sentence repeats, at most.
_TOLD = 8


def read_inputs(request: pb.ModelInferRequest, known: Mapping[str, str]) -> dict[str, bytes | bool]:
    """The request's inputs by name, each of one element, as typed contents or as raw bytes.

    Args:
        request: as it came.
        known: datatypes of the inputs that there are.

    Raises:
        ServiceError: the inputs at fault.
    """
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        sentence = f"has {len(raw)} entries for {len(request.inputs)} inputs; send one for each, or contents"
        refuse([Violation("raw_input_contents", sentence)])
    refuse(_faults(request, known))
    found: dict[str, bytes | bool] = {}
    for index, tensor in enumerate(request.inputs):
        value = _raw(tensor, raw[index]) if raw else _typed(tensor)
        if value is None:
            refuse([Violation(f"inputs[{index}]", f"{tensor.name} does not have exactly one element")])
            continue
        found[tensor.name] = value
    return found


def texts(name: str, values: Sequence[str], response: pb.ModelInferResponse, *, raw: bool) -> None:
    """Adds a tensor of texts to a response.

    Args:
        name: of the tensor.
        values: its elements.
        response: that it is added to.
        raw: in which form.
    """
    encoded = [value.encode() for value in values]
    tensor = response.outputs.add(name=name, datatype="BYTES", shape=[len(encoded)])
    if raw:
        parts = (part for value in encoded for part in (_LENGTH.pack(len(value)), value))
        response.raw_output_contents.append(b"".join(parts))
    else:
        tensor.contents.bytes_contents.extend(encoded)


def _faults(request: pb.ModelInferRequest, known: Mapping[str, str]) -> Iterator[Violation]:
    seen = set()
    for index, tensor in enumerate(request.inputs):
        field, datatype = f"inputs[{index}]", known.get(tensor.name)
        if datatype is None:
            sentence = f"is named {quote(tensor.name)}; this model's inputs are {', '.join(known)}"
            yield Violation(f"{field}.name", sentence)
            continue
        if tensor.name in seen:
            yield Violation(f"{field}.name", f"is {tensor.name} again; send each input once")
        seen.add(tensor.name)
        if tensor.datatype != datatype:
            yield Violation(f"{field}.datatype", f"is {quote(tensor.datatype)}; {tensor.name} is {datatype}")
        if any(size != 1 for size in tensor.shape) or not tensor.shape:
            shape = list(tensor.shape) if len(tensor.shape) <= _TOLD else f"of {len(tensor.shape)} dimensions"
            yield Violation(f"{field}.shape", f"is {shape}; {tensor.name} has one element, [1]")
        for name in tensor.parameters:
            yield Violation(f"{field}.parameters", f"has {quote(name)}; this server takes none there")


def _typed(tensor: pb.ModelInferRequest.InferInputTensor) -> bytes | bool | None:
    contents = tensor.contents
    values = contents.bytes_contents if tensor.datatype == "BYTES" else contents.bool_contents
    others = sum(len(found) for _, found in contents.ListFields()) - len(values)
    return values[0] if len(values) == 1 and not others else None


def _raw(tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes) -> bytes | bool | None:
    if tensor.contents.ListFields():
        return None
    if tensor.datatype == "BOOL":
        return raw != b"\0" if len(raw) == 1 else None
    text = raw[_LENGTH.size :]
    return text if len(raw) >= _LENGTH.size and _LENGTH.unpack(raw[:4])[0] == len(text) else None
