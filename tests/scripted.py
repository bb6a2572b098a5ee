"""A small real gRPC server of the real service, whose "model" says its prompt backwards, a character a token.

For tests of clients: what they send is kept, and some prompts make the server do what servers do on bad days.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from longspan.v1 import inference_pb2 as pb
from longspan.v1 import inference_pb2_grpc, types_pb2

SERVICE = "longspan.v1.InferenceService"
MODEL = "mirror"


def fail(context: Any, code: grpc.StatusCode, message: str, *details: Any) -> None:
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    context.abort_with_status(rpc_status.to_status(status))


def _busy(context: Any, seconds: float = 2.5) -> None:
    fail(
        context,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "the queue is full; try again in 2 s",
        error_details_pb2.RetryInfo(
            retry_delay=duration_pb2.Duration(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))
        ),
        error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="longspan", metadata={"limit": "4"}),
    )


def _invalid(context: Any) -> None:
    fail(
        context,
        grpc.StatusCode.INVALID_ARGUMENT,
        "the request has 2 mistakes",
        error_details_pb2.BadRequest(
            field_violations=[
                error_details_pb2.BadRequest.FieldViolation(field="sampling.top_p", description="is above 1"),
                error_details_pb2.BadRequest.FieldViolation(field="n", description="is 0"),
            ]
        ),
    )


def _unknown(context: Any) -> None:
    fail(
        context,
        grpc.StatusCode.NOT_FOUND,
        "no such model",
        error_details_pb2.ResourceInfo(resource_type="model", resource_name="gpt-9"),
    )


def _unavailable(context: Any) -> None:
    fail(context, grpc.StatusCode.UNAVAILABLE, "the server is loading its model")


def _contradiction(context: Any) -> None:
    """Details of another status than the call's, as a broken proxy might send."""
    packed = status_pb2.Status(code=3, message="other").SerializeToString()
    context.set_trailing_metadata((("grpc-status-details-bin", packed),))
    context.abort(grpc.StatusCode.INTERNAL, "oops")


BAD_DAYS: dict[str, Callable[[Any], None]] = {
    "!busy": _busy,
    "!invalid": _invalid,
    "!unknown": _unknown,
    "!contradiction": _contradiction,
    "!unavailable": _unavailable,
    "!bug": lambda context: context.abort(grpc.StatusCode.INTERNAL, "internal error; request r1"),
    "!data": lambda context: context.abort(grpc.StatusCode.DATA_LOSS, "lost"),
}


class Mirror(inference_pb2_grpc.InferenceServiceServicer):
    """The service.

    Attributes:
        requests: what arrived, in order.
        metadata: what came with the last of them.
        ended: released once for every streaming call that the client left early.
        forever: released once for every endless stream that has sent its first delta.
        turn_away: so many calls of Generate from now on find the queue full.
        away_after: so many further calls of Generate are answered before those of ``away_for``.
        away_for: so many calls of Generate then find a server that restarts.
        hold: calls of Generate last until the client leaves.
    """

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.metadata: dict[str, Any] = {}
        self.ended = threading.Semaphore(0)
        self.forever = threading.Semaphore(0)
        self.turn_away = 0
        self.away_after = 0
        self.away_for = 0
        self.hold = False

    def _prompt(self, request: pb.GenerateRequest, context: Any) -> str:
        self.metadata = dict(context.invocation_metadata())
        match request.WhichOneof("prompt"):
            case "text":
                text = request.text
            case "token_ids":
                text = "".join(map(chr, request.token_ids.ids))
            case "chat":
                text = "".join(f"{message.role}: {message.content}\n" for message in request.chat.messages)
            case _:
                text = ""
        if text in BAD_DAYS:
            BAD_DAYS[text](context)
        if text == "!twice unavailable" and len(self.requests) < 3:
            _unavailable(context)
        return text

    def _answer(self, request: pb.GenerateRequest, prompt: str) -> tuple[str, int]:
        answer = prompt[::-1]
        limit = request.stop.max_tokens if request.stop.HasField("max_tokens") else len(answer)
        cut = answer[:limit]
        reason = types_pb2.FINISH_REASON_LENGTH if len(cut) < len(answer) else types_pb2.FINISH_REASON_STOP
        return cut, reason

    def _result(self, request: pb.GenerateRequest, index: int, count: int, reason: int) -> Any:
        result = types_pb2.SampleResult(index=index, finish_reason=reason, token_count=count)  # type: ignore[arg-type]
        if reason == types_pb2.FINISH_REASON_STOP:
            if request.stop.stop_strings:
                result.matched_stop.text = request.stop.stop_strings[0]
            else:
                result.matched_stop.token_id = 2
        return result

    def _logprobs(self, token: str) -> types_pb2.PositionLogprobs:
        one = types_pb2.TokenLogprob(token_id=ord(token), text=token, logprob=-0.5, rank=1)
        return types_pb2.PositionLogprobs(chosen=one, top=[one])

    def _usage(self, prompt: str, tokens: int) -> types_pb2.Usage:
        return types_pb2.Usage(prompt_tokens=len(prompt), cached_prompt_tokens=1, completion_tokens=tokens)

    def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        self.requests.append(request)
        prompt = self._prompt(request, context)
        if self.turn_away:
            self.turn_away -= 1
            _busy(context, seconds=0.01)
        if self.away_after:
            self.away_after -= 1
        elif self.away_for:
            self.away_for -= 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "the server restarts")
        if prompt == "!forever" or self.hold:
            context.add_callback(self.ended.release)
            self.forever.release()
            while context.is_active():
                threading.Event().wait(0.005)
            return pb.GenerateResponse()
        answer, reason = self._answer(request, prompt)
        wanted = request.logprobs.HasField("output")
        return pb.GenerateResponse(
            request_id=request.request_id or "r1",
            model=MODEL,
            completions=[
                pb.Completion(
                    result=self._result(request, index, len(answer), reason),
                    text=answer,
                    token_ids=[ord(token) for token in answer],
                    logprobs=[self._logprobs(token) for token in answer] if wanted else [],
                )
                for index in range(request.n if request.HasField("n") else 1)
            ],
            prompt_logprobs=[self._logprobs(token) for token in prompt[1:]]
            if request.logprobs.HasField("prompt")
            else [],
            usage=self._usage(prompt, len(answer)),
            timings=types_pb2.Timings(
                time_to_first_token_seconds=0.25, decode_seconds=1.0, total_seconds=1.25
            ),
        )

    def StreamGenerate(
        self, request: pb.StreamGenerateRequest, context: Any
    ) -> Iterator[pb.StreamGenerateResponse]:
        inner = request.request
        self.requests.append(inner)
        prompt = self._prompt(inner, context)
        yield pb.StreamGenerateResponse(
            accepted=pb.Accepted(
                request_id=inner.request_id or "r1",
                model=MODEL,
                prompt_tokens=len(prompt),
                cached_prompt_tokens=1,
            )
        )
        if inner.logprobs.HasField("prompt"):
            positions = [self._logprobs(token) for token in prompt[1:]]
            yield pb.StreamGenerateResponse(prompt_logprobs=pb.PromptLogprobs(positions=positions))
        if prompt == "!unavailable later":
            _unavailable(context)
        if prompt == "!forever":
            context.add_callback(self.ended.release)
            yield pb.StreamGenerateResponse(delta=pb.Delta(text="on ", token_ids=[1]))
            self.forever.release()
            while context.is_active():
                threading.Event().wait(0.005)
                yield pb.StreamGenerateResponse(delta=pb.Delta(text="and on ", token_ids=[1]))
            return
        answer, reason = self._answer(inner, prompt)
        samples = inner.n if inner.HasField("n") else 1
        for position, token in enumerate(answer):
            for index in range(samples):
                delta = pb.Delta(index=index, text=token, token_ids=[ord(token)])
                if inner.logprobs.HasField("output"):
                    delta.logprobs.append(self._logprobs(token))
                if position == len(answer) - 1:
                    delta.result.CopyFrom(self._result(inner, index, len(answer), reason))
                yield pb.StreamGenerateResponse(delta=delta)
        yield pb.StreamGenerateResponse(
            finished=pb.Finished(
                results=[self._result(inner, index, len(answer), reason) for index in range(samples)],
                usage=self._usage(prompt, len(answer) * samples),
                timings=types_pb2.Timings(time_to_first_token_seconds=0.25, decode_seconds=1.0),
            )
        )

    def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortResponse:
        return pb.AbortResponse(found=request.request_id == "running")

    def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        self.requests.append(request)
        text = request.text if request.HasField("text") else request.chat.messages[-1].content
        tokens = [*text] if request.without_special_tokens else ["<s>", *text]
        return pb.TokenizeResponse(token_ids=[ord(token[0]) for token in tokens], tokens=tokens)

    def Detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:
        ids = [i for i in request.token_ids if i >= 32 or request.keep_special_tokens]
        return pb.DetokenizeResponse(text="".join(map(chr, ids)))

    def CountTokens(self, request: pb.CountTokensRequest, context: Any) -> pb.CountTokensResponse:
        self.requests.append(request)
        text = request.text if request.HasField("text") else request.chat.messages[-1].content
        return pb.CountTokensResponse(token_count=len(text), context_length=4096)

    def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[MODEL])

    def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Any) -> pb.GetModelInfoResponse:
        if request.model not in ("", MODEL):
            _unknown(context)
        return pb.GetModelInfoResponse(name=MODEL, context_length=4096, limits=pb.Limits(n=16))

    def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Any) -> pb.GetServerInfoResponse:
        return pb.GetServerInfoResponse(version="1.2.3", load=pb.Load(running=7))


class Running:
    """A server that runs: its port, its service, and a switch for its health."""

    def __init__(self, port: int, service: Mirror, health_service: health.HealthServicer) -> None:
        self.port = port
        self.service = service
        self._health = health_service

    def set_ready(self, ready: bool) -> None:
        status = health_pb2.HealthCheckResponse
        self._health.set(SERVICE, status.SERVING if ready else status.NOT_SERVING)


@contextmanager
def serving(port: int = 0, credentials: grpc.ServerCredentials | None = None) -> Iterator[Running]:
    """Runs the server on a free port, or a given one, until the block ends; with credentials by TLS."""
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=8), options=[("grpc.so_reuseport", 0)])
    service, health_service = Mirror(), health.HealthServicer()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(service, server)
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
    address = f"127.0.0.1:{port}"
    bound = (
        server.add_insecure_port(address)
        if credentials is None
        else server.add_secure_port(address, credentials)
    )
    running = Running(bound, service, health_service)
    running.set_ready(True)
    server.start()
    try:
        yield running
    finally:
        server.stop(None).wait()
