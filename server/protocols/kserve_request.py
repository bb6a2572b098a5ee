"""A request of the Open Inference Protocol and its answer, by names of Triton's vLLM backend and Dynamo."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

from tritonclient.grpc import service_pb2 as pb

from longspan.v1 import inference_pb2
from server.api.answer import Event
from server.api.checks import refuse
from server.api.errors import Violation, quote
from server.protocols.kserve_parameters import INPUT as PARAMETERS
from server.protocols.kserve_parameters import apply_parameters
from server.protocols.kserve_tensors import read_inputs, texts
from server.protocols.reasons import REASONS

MOST_ID = 1024
"""Characters of a request's id, at most: every response repeats it."""

VERSION = "1"
"""Of the only model, as the protocol wants one."""

INPUTS = {
    "text_input": "BYTES",
    "stream": "BOOL",
    PARAMETERS: "BYTES",
    "exclude_input_in_output": "BOOL",
    "return_finish_reason": "BOOL",
}
"""Datatypes of inputs. All but the first may be left out."""

OUTPUTS = ("text_output", "finish_reason")
"""Both of BYTES, with an element for each sample."""


class KserveRequest:
    """One request.

    Args:
        request: as it came.
        streams: whether the call can give several responses.

    Raises:
        ServiceError: fields at fault.

    Attributes:
        own: Longspan's form of it.
    """

    def __init__(self, request: pb.ModelInferRequest, *, streams: bool) -> None:
        inputs = read_inputs(request, INPUTS)
        refuse(_faults(request, inputs, streams=streams))
        text = _text(inputs["text_input"])
        self.own = inference_pb2.GenerateRequest(model=request.model_name, text=text)
        parameters = inputs.get(PARAMETERS)
        apply_parameters(parameters if isinstance(parameters, bytes) else None, request.parameters, self.own)
        self._id = request.id
        self._raw = bool(request.raw_input_contents)
        self._streams = bool(inputs.get("stream", False))
        self._before = "" if inputs.get("exclude_input_in_output", True) else text
        asked = [output.name for output in request.outputs] or OUTPUTS
        reason = inputs.get("return_finish_reason", True)
        self._outputs = [name for name in OUTPUTS if name in asked and (reason or name == OUTPUTS[0])]

    async def responses(
        self, events: AsyncIterator[Event], model: str
    ) -> AsyncIterator[pb.ModelInferResponse]:
        """One response for each delta if the request streams, else one in all. The last one says that it is.

        Args:
            events: of the answer.
            model: name of it.
        """
        count = left = 0
        answers: list[str] = []
        reasons: list[str] = []
        async for event in events:
            if event.HasField("accepted"):
                # Not earlier: how many samples the request asks for was not checked.
                count = left = self.own.n
                answers, reasons = [self._before] * count, [""] * count
            if not event.HasField("delta"):
                continue
            delta = event.delta
            answers[delta.index] += delta.text
            if delta.HasField("result"):
                reasons[delta.index] = REASONS[delta.result.finish_reason]
                left -= 1
            if not left or (self._streams and (delta.text or delta.HasField("result"))):
                yield self._response(model, answers, reasons, final=not left)
                answers, reasons = [""] * count, [""] * count

    def _response(
        self, model: str, answers: list[str], reasons: list[str], *, final: bool
    ) -> pb.ModelInferResponse:
        response = pb.ModelInferResponse(model_name=model, model_version=VERSION, id=self._id)
        response.parameters["triton_final_response"].bool_param = final
        for name, values in zip(OUTPUTS, (answers, reasons), strict=True):
            if name in self._outputs:
                texts(name, values, response, raw=self._raw)
        return response


def check_version(version: str) -> None:
    """Whether the model is there in a version.

    Raises:
        ServiceError: it is not.
    """
    if version not in ("", VERSION):
        sentence = f"is {quote(version)}; this server has version {VERSION}, which an empty one means too"
        refuse([Violation("model_version", sentence)])


def _faults(
    request: pb.ModelInferRequest, inputs: dict[str, bytes | bool], *, streams: bool
) -> Iterator[Violation]:
    check_version(request.model_version)
    if len(request.id) > MOST_ID:
        yield Violation("id", f"has {len(request.id)} characters; at most {MOST_ID} are taken")
    if "text_input" not in inputs:
        yield Violation("inputs", "has no text_input; send the prompt as BYTES of shape [1]")
    for index, output in enumerate(request.outputs):
        if output.name not in OUTPUTS:
            sentence = f"is named {quote(output.name)}; this model's outputs are {', '.join(OUTPUTS)}"
            yield Violation(f"outputs[{index}].name", sentence)
        for name in output.parameters:
            yield Violation(
                f"outputs[{index}].parameters", f"has {quote(name)}; this server takes none there"
            )
    if inputs.get("stream") and not streams:
        yield Violation("stream", "is true; ModelStreamInfer streams, ModelInfer answers once")
    if inputs.get("stream") and not inputs.get("exclude_input_in_output", True):
        yield Violation("exclude_input_in_output", "is false; streams have the output only")


def _text(value: bytes | bool) -> str:
    assert isinstance(value, bytes)
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        refuse([Violation("text_input", f"is not UTF-8: {error.reason} at byte {error.start}")])
        raise
