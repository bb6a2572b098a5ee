"""``inference.GRPCInferenceService``: the Open Inference Protocol v2, with Triton's stream."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import grpc
from tritonclient.grpc import model_config_pb2
from tritonclient.grpc import service_pb2 as pb

from server.api import errors
from server.api.failures import log_failure, log_refusal
from server.api.interceptor import Context, call_metadata, cancellation_code
from server.api.other_service import OtherService, other_service
from server.api.service import VERSION as SERVER_VERSION
from server.api.service import InferenceServicer
from server.encoder_messages import Task
from server.observe.logging import request_id
from server.protocols.kserve_request import (
    INPUTS,
    MOST_ID,
    OUTPUTS,
    VERSION,
    KserveRequest,
    check_version,
)
from server.protocols.kserve_stream import side_by_side

_PLATFORM = "longspan"
_STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
_TYPES = {"BYTES": model_config_pb2.TYPE_STRING, "BOOL": model_config_pb2.TYPE_BOOL}


def service(inference: InferenceServicer) -> OtherService:
    """The service, whose requests ``inference`` answers."""
    descriptor = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    return other_service(descriptor, KserveServicer(inference), accounted=("ModelInfer",))


class KserveServicer:
    """Its methods; those that it lacks are refused. Its errors are ``ServiceError``s."""

    def __init__(self, inference: InferenceServicer) -> None:
        self._inference = inference
        self._state = inference.accounts.state

    async def ServerLive(  # noqa: N802
        self, request: pb.ServerLiveRequest, context: Context
    ) -> pb.ServerLiveResponse:
        """That it answers."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(  # noqa: N802
        self, request: pb.ServerReadyRequest, context: Context
    ) -> pb.ServerReadyResponse:
        """Whether requests are answered."""
        return pb.ServerReadyResponse(ready=self._state.phase == "ready")

    async def ModelReady(  # noqa: N802
        self, request: pb.ModelReadyRequest, context: Context
    ) -> pb.ModelReadyResponse:
        """Whether requests to a model are answered; an unknown one is not ready."""
        served = self._state.served
        known = served is not None and request.name in ("", served.name) and request.version in ("", VERSION)
        return pb.ModelReadyResponse(ready=known and self._state.phase == "ready")

    async def ServerMetadata(  # noqa: N802
        self, request: pb.ServerMetadataRequest, context: Context
    ) -> pb.ServerMetadataResponse:
        """Name and version."""
        return pb.ServerMetadataResponse(name=_PLATFORM, version=SERVER_VERSION)

    async def ModelMetadata(  # noqa: N802
        self, request: pb.ModelMetadataRequest, context: Context
    ) -> pb.ModelMetadataResponse:
        """Inputs and outputs."""
        served = self._state.model(request.name)
        check_version(request.version)
        tensor = pb.ModelMetadataResponse.TensorMetadata
        return pb.ModelMetadataResponse(
            name=served.name,
            versions=[VERSION],
            platform=_PLATFORM,
            inputs=[tensor(name=name, datatype=datatype, shape=[1]) for name, datatype in INPUTS.items()],
            outputs=[tensor(name=name, datatype="BYTES", shape=[-1]) for name in OUTPUTS],
        )

    async def ModelConfig(  # noqa: N802
        self, request: pb.ModelConfigRequest, context: Context
    ) -> pb.ModelConfigResponse:
        """The same as Triton configures it: a request may have several responses."""
        served = self._state.model(request.name)
        check_version(request.version)
        config = model_config_pb2.ModelConfig(name=served.name, platform=_PLATFORM, backend=_PLATFORM)
        config.model_transaction_policy.decoupled = True
        for name, datatype in INPUTS.items():
            config.input.add(
                name=name, data_type=_TYPES[datatype], dims=[1], optional=name != next(iter(INPUTS))
            )
        for name in OUTPUTS:
            config.output.add(name=name, data_type=model_config_pb2.TYPE_STRING, dims=[-1])
        return pb.ModelConfigResponse(config=config)

    async def ModelInfer(  # noqa: N802
        self, request: pb.ModelInferRequest, context: Context
    ) -> pb.ModelInferResponse:
        """Generates and answers once."""
        answer: pb.ModelInferResponse | None = None
        async with aclosing(self._responses(request, streams=False)) as responses:
            # To the end, where the request's account learns how it ended.
            async for response in responses:
                answer = response
        if answer is None:
            raise RuntimeError("the answer ended before its last response")
        return answer

    def ModelStreamInfer(  # noqa: N802
        self, requests: AsyncIterator[pb.ModelInferRequest], context: Context
    ) -> AsyncGenerator[pb.ModelStreamInferResponse, None]:
        """Answers the requests of a stream side by side; the error of one is told in its response."""
        return side_by_side(requests, lambda request: self._of_stream(request, context))

    async def _of_stream(
        self, request: pb.ModelInferRequest, context: Context
    ) -> AsyncGenerator[pb.ModelStreamInferResponse, None]:
        """The responses to one request of a stream, which has an account of its own."""
        request_id.set(uuid.uuid4().hex)
        account = self._inference.accounts.open(lambda: call_metadata(context))
        code: grpc.StatusCode | None = None
        error: errors.ServiceError | None = None
        refusal = pb.ModelInferResponse(id=request.id[:MOST_ID], model_name=request.model_name[:MOST_ID])
        texts = self._state.settings.log_texts
        try:
            responses = self._responses(request, streams=True)
            del request  # its bytes: the client may not read for long, and have sent many
            async with aclosing(responses):
                async for response in responses:
                    yield pb.ModelStreamInferResponse(infer_response=response)
            code = grpc.StatusCode.OK
        except errors.ServiceError as caught:
            code, error = caught.code, caught
            log_refusal(caught, texts=texts)
        except asyncio.CancelledError:
            raise
        except Exception as caught:
            log_failure(caught, _STREAM, texts=texts)
            error = errors.internal(request_id.get())
            code = error.code
        finally:
            account.close(code or cancellation_code(context), error)
        if error is not None:
            refusal.parameters["triton_final_response"].bool_param = True
            message = f"[{error.code.name}] {error.message}"
            del error, responses  # their frames have the request
            yield pb.ModelStreamInferResponse(error_message=message, infer_response=refusal)

    async def _responses(
        self, request: pb.ModelInferRequest, *, streams: bool
    ) -> AsyncGenerator[pb.ModelInferResponse, None]:
        served = self._state.model(request.model_name)
        served.check_task(Task.GENERATE)
        asked = KserveRequest(request, streams=streams)
        async with aclosing(self._inference.events(asked.own)) as events:
            async for response in asked.responses(events, served.name):
                yield response
