"""The steps of every call: a name, parsing, errors as statuses, a limit for slow readers, metrics."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from longspan.v1 import encoder_pb2, inference_pb2
from server.access.callers import Caller, Callers, DeniedError, caller
from server.api import errors
from server.api.account import Account, Accounts
from server.api.checks import valid_request_id
from server.api.client_faults import of_client
from server.api.failures import log_failure, log_refusal
from server.api.open_calls import OpenCalls
from server.api.stall import end_unless_sent, stall_watch
from server.api.state import ServerState
from server.observe.logging import request_id
from server.observe.metrics import GrpcMetrics
from server.observe.orca import TRAILER, LoadReports
from server.observe.tracing import Metadata

# A deadline and its cancellation are not seen at exactly the same time.
_DEADLINE_SLACK_SECONDS = 0.02

_ENCODER_SERVICE = encoder_pb2.DESCRIPTOR.services_by_name["EncoderService"]
# Calls that the engine works on.
_ACCOUNTED = {
    f"/{inference_pb2.DESCRIPTOR.services_by_name['InferenceService'].full_name}/{name}"
    for name in ("Generate", "StreamGenerate")
} | {f"/{_ENCODER_SERVICE.full_name}/{method.name}" for method in _ENCODER_SERVICE.methods}
# Requests that may have a name of their own.
_NAMED = inference_pb2.GenerateRequest | encoder_pb2.EmbedRequest | encoder_pb2.ScoreRequest
# The gateway of --protocols vllm heeds these where nothing came before them, not even headers: else it tries
# again for ever.
_BY_HEADERS_ALONE = {
    ("/vllm.grpc.engine.VllmEngine/SubscribeKvEvents", code)
    for code in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.OUT_OF_RANGE)
}
_OPEN = "/grpc.health.v1.Health/"
_KINDS = (("unary_unary", "unary"), ("unary_stream", "server_stream"), ("stream_stream", "bidi_stream"))

Context = aio.ServicerContext[Any, Any]


def cancellation_code(context: Context) -> grpc.StatusCode:
    """Whether a call that was cancelled ran into its deadline or was given up."""
    remaining = context.time_remaining()
    late = remaining is not None and remaining <= _DEADLINE_SLACK_SECONDS
    return grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED


class _Call:
    """One call's part in the metrics; if the engine works on it, with the request's account."""

    def __init__(self, metrics: GrpcMetrics, account: Account | None, kind: str, method: str) -> None:
        service, _, name = method.removeprefix("/").rpartition("/")
        self._metrics = metrics
        self._account = account
        self._labels = (kind, service, name)
        self._begun = time.monotonic()
        self.sent = metrics.sent.labels(*self._labels).inc
        """To be called for every message that was sent."""
        self.named = False
        """Whether the client has been told the call's name."""
        metrics.started.labels(*self._labels).inc()

    async def name(self, context: Context) -> None:
        """Tells the client the call's name, to be called once: before the first message, or an error.

        Not earlier, and not where the client should try again: gRPC repeats a call only until the server has
        answered anything. So a call that the engine had got is named: its prompt may have ended the
        engine.
        """
        self.named = True
        await context.send_initial_metadata((("x-request-id", request_id.get()),))

    def repeatable(self, error: errors.ServiceError) -> bool:
        """Whether the client may send the call again after this error."""
        begun = self._account is not None and self._account.submitted
        return error.code is grpc.StatusCode.UNAVAILABLE and not begun

    def ended(self, code: grpc.StatusCode, error: errors.ServiceError | None = None) -> None:
        """The call ended; to be called before its client is told."""
        if self._account is not None:
            self._account.close(code, error)
        labels = (*self._labels, code.name)
        self._metrics.handled.labels(*labels).inc()
        self._metrics.seconds.labels(*labels).observe(time.monotonic() - self._begun)


class Interceptor(aio.ServerInterceptor):
    """Wraps every method of every service of the server."""

    def __init__(
        self,
        state: ServerState,
        metrics: GrpcMetrics,
        accounts: Accounts,
        callers: Callers,
        accounted: Collection[str] = (),
        reports: LoadReports | None = None,
    ) -> None:
        """Begins with no call open.

        Args:
            state: of the server.
            metrics: of the calls.
            accounts: of requests to the engine.
            callers: who may call.
            accounted: methods of other protocols that are such requests.
            reports: tells balancers the load, where that is wanted.
        """
        self._state = state
        self._metrics = metrics
        self._accounts = accounts
        self._callers = callers
        self._reports = reports
        self._accounted = _ACCOUNTED.union(accounted)
        self._open = OpenCalls(state.settings.max_queue)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The method's handler, wrapped; parsing moves inside, for its errors to be seen."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None:
            return None
        kind = next((word for name, word in _KINDS if getattr(handler, name) is not None), None)
        if kind is None:
            raise NotImplementedError(f"{method}: no service here has client streaming")
        try:
            self._open.enter(method)
            known = self._known(method, handler_call_details.invocation_metadata or ())
        except errors.ServiceError as error:
            return self._refusal(error, kind, method)
        except DeniedError as error:
            return self._refusal(errors.unauthenticated(str(error)), kind, method)
        parse, serialize = handler.request_deserializer, handler.response_serializer
        if kind == "unary":
            return grpc.unary_unary_rpc_method_handler(
                self._unary(handler.unary_unary, parse, method, known), response_serializer=serialize
            )
        if kind == "server_stream":
            return grpc.unary_stream_rpc_method_handler(
                self._stream(handler.unary_stream, parse, kind, method, known), response_serializer=serialize
            )
        return grpc.stream_stream_rpc_method_handler(
            self._bidi(handler.stream_stream, parse, method, known), response_serializer=serialize
        )

    def _known(self, method: str, metadata: Metadata) -> Caller | None:
        """The caller; ``None`` if only its connection can tell."""
        # Probes of health have no token, and learn nothing but whether the server answers.
        return self._callers.everyone if method.startswith(_OPEN) else self._callers.by_token(metadata)

    def _refusal(self, error: errors.ServiceError, kind: str, method: str) -> Any:
        async def handle(payload: Any, context: Context) -> None:
            async with self._guard(context, kind, method):
                raise error

        # A handler of this kind is called before the message is received.
        return grpc.stream_stream_rpc_method_handler(handle)

    def _unary(self, behavior: Any, parse: Callable[[Any], Any], method: str, known: Caller | None) -> Any:
        async def handle(payload: bytes, context: Context) -> Any:
            async with self._guard(context, "unary", method) as call:
                self._identify(known, context)
                request = self._begin(payload, parse)
                response = await behavior(request, context)
                await call.name(context)
                call.sent()
                end_unless_sent()
                return response
            # The client has gone. Of a call that returned without an answer gRPC would serialize that.
            raise asyncio.CancelledError

        return handle

    def _stream(
        self,
        behavior: Any,
        parse: Callable[[Any], Any] | None,
        kind: str,
        method: str,
        known: Caller | None,
    ) -> Any:
        async def handle(payload: Any, context: Context) -> None:
            async with self._guard(context, kind, method) as call:
                self._identify(known, context)
                self._open.stay(method, context.peer())
                request = self._begin(payload, parse)
                async with stall_watch() as watch, aclosing(behavior(request, context)) as messages:
                    async for message in messages:
                        if not call.named:
                            await call.name(context)
                        watch.begun = watch.time()
                        await context.write(message)
                        watch.begun = None
                        call.sent()

        return handle

    def _bidi(self, behavior: Any, parse: Callable[[Any], Any], method: str, known: Caller | None) -> Any:
        async def parsed(payloads: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
            async for payload in payloads:
                # Again for each: the stream may outlive its token and the limits of its identity.
                self._identify_again(method, context)
                yield self._parse(payload, parse)

        def begin(payloads: AsyncIterator[bytes], context: Context) -> Any:
            return behavior(parsed(payloads, context), context)

        return self._stream(begin, None, "bidi_stream", method, known)

    def _parse(self, payload: bytes, parse: Callable[[Any], Any]) -> Any:
        descriptor = parse.__self__.DESCRIPTOR  # type: ignore[attr-defined]
        self._state.check_message(payload, descriptor)
        try:
            return parse(payload)
        except DecodeError as error:
            raise errors.malformed(descriptor.full_name) from error

    def _identify(self, known: Caller | None, context: Context) -> None:
        """Tells this task who makes the call, before its message is parsed."""
        if known is None:
            try:
                known = self._callers.by_certificate(context.auth_context())
            except DeniedError as error:
                raise errors.unauthenticated(str(error)) from error
        caller.set(known)

    def _identify_again(self, method: str, context: Context) -> None:
        try:
            known = self._known(method, call_metadata(context))
        except DeniedError as error:
            raise errors.unauthenticated(str(error)) from error
        self._identify(known, context)

    def _begin(self, payload: Any, parse: Callable[[Any], Any] | None) -> Any:
        """Parses the request, if it is within the limits, and takes its name where it has one."""
        request = payload if parse is None else self._parse(payload, parse)
        generate = request.request if isinstance(request, inference_pb2.StreamGenerateRequest) else request
        named = isinstance(generate, _NAMED)
        given = generate.request_id if named else ""
        if given and valid_request_id(given):
            request_id.set(given)
        return request

    @asynccontextmanager
    async def _guard(self, context: Context, kind: str, method: str) -> AsyncIterator[_Call]:
        """Turns exceptions into statuses, and counts how the call ended."""
        request_id.set(uuid.uuid4().hex)
        account = self._accounts.open(lambda: call_metadata(context)) if method in self._accounted else None
        call = _Call(self._metrics, account, kind, method)
        error = None
        code = grpc.StatusCode.OK
        try:
            yield call
        except errors.ServiceError as caught:
            code, error = caught.code, caught
            log_refusal(caught, texts=self._state.settings.log_texts)
        except asyncio.CancelledError:
            call.ended(cancellation_code(context))
            raise
        except aio.InternalError:  # a message could not be sent: the client has gone
            code = cancellation_code(context)
        except Exception as caught:
            log_failure(caught, method, texts=self._state.settings.log_texts)
            error = errors.internal(request_id.get())
            code = error.code
        call.ended(code, error)
        if account is not None and self._reports is not None:
            if not of_client(code, error):
                self._reports.count(failed=error is not None)
            if error is None:
                usage = account.record.usage() if account.record is not None else None
                report = self._reports.report(usage).SerializeToString()
                context.set_trailing_metadata(((TRAILER, report),))
        if error is not None:
            await _abort(call, context, error, alone=(method, code) in _BY_HEADERS_ALONE)


def call_metadata(context: Context) -> Metadata:
    """That of a call."""
    return [(key, value) for key, value in context.invocation_metadata() or ()]


async def _abort(call: _Call, context: Context, error: errors.ServiceError, *, alone: bool) -> None:
    with suppress(aio.InternalError):  # the client has gone meanwhile
        if not (call.named or call.repeatable(error) or alone):
            await call.name(context)
        await context.abort_with_status(error.status())
