"""Refusals of calls: a gRPC status, a sentence, and google.rpc details for programs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

_Code = grpc.StatusCode
_DOMAIN = "longspan"

# A status travels in HTTP/2 headers, of which clients take 8 KiB: what users sent is quoted in part only.
MOST_VIOLATIONS = 16
_MOST_IN_SENTENCE = 4
_QUOTED = 80

# About what an engine takes to start again.
_ENGINE_RETRY_SECONDS = 5.0


class Violation(NamedTuple):
    """A field of the request, by its path in the proto, and what is wrong with it."""

    field: str
    description: str


def quote(text: str) -> str:
    """A value from a request, as a sentence quotes it: escaped, its end left out where it is long."""
    return ascii(text if len(text) <= _QUOTED else text[:_QUOTED] + "...")


class ServiceError(Exception):
    """A call that ends with something other than OK.

    Attributes:
        code: the gRPC status.
        message: a sentence for people, with what to do about it.
        reason: a fixed name of the cause, upper case; the label of rejection metrics in lower case.
        details: ``google.rpc`` messages for programs.
    """

    def __init__(self, code: grpc.StatusCode, message: str, reason: str, *details: Message) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.reason = reason
        self.details = details

    def status(self) -> grpc.Status:
        """The status as gRPC sends it, details in the ``grpc-status-details-bin`` trailer."""
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        for detail in self.details:
            packed = Any()
            packed.Pack(detail)
            status.details.append(packed)
        return rpc_status.to_status(status)


def refusal(
    code: grpc.StatusCode, reason: str, sentence: str, *details: Message, **figures: object
) -> ServiceError:
    """An error with an ``ErrorInfo`` of its reason and figures, before further details."""
    metadata = {name: str(figure) for name, figure in figures.items()}
    info = error_details_pb2.ErrorInfo(reason=reason, domain=_DOMAIN, metadata=metadata)
    return ServiceError(code, sentence, reason, info, *details)


def bad_field(field: str, description: str) -> error_details_pb2.BadRequest:
    """The detail that names one field at fault."""
    return _bad_request([Violation(field, description)])


def _bad_request(violations: Sequence[Violation]) -> error_details_pb2.BadRequest:
    fields = [error_details_pb2.BadRequest.FieldViolation(**each._asdict()) for each in violations]
    return error_details_pb2.BadRequest(field_violations=fields)


def _retry(seconds: float) -> error_details_pb2.RetryInfo:
    delay = Duration()
    delay.FromTimedelta(timedelta(seconds=seconds))
    return error_details_pb2.RetryInfo(retry_delay=delay)


def invalid(violations: Sequence[Violation]) -> ServiceError:
    """Fields of the request are wrong: all of them in one answer, up to 16.

    A check may stop after one more than these: then the sentence says that there are more.
    """
    sentence = "; ".join(f"{field}: {description}" for field, description in violations[:_MOST_IN_SENTENCE])
    if len(violations) > MOST_VIOLATIONS:
        sentence += f"; and at least {MOST_VIOLATIONS + 1 - _MOST_IN_SENTENCE} more"
    elif len(violations) > _MOST_IN_SENTENCE:
        sentence += f"; and {len(violations) - _MOST_IN_SENTENCE} more"
    detail = _bad_request(violations[:MOST_VIOLATIONS])
    return ServiceError(_Code.INVALID_ARGUMENT, sentence, "INVALID_ARGUMENT", detail)


def malformed(message_name: str) -> ServiceError:
    """The request's bytes are no protobuf message of the expected type."""
    sentence = (
        f"the request is not a valid {message_name}: its bytes are cut off or of another type, or a text in "
        "it (a prompt, a chat role, a stop string) is not UTF-8"
    )
    return refusal(_Code.INVALID_ARGUMENT, "MALFORMED_REQUEST", sentence, message=message_name)


def request_too_large(actual: int, limit: int) -> ServiceError:
    """The message has more bytes than any request that this server can answer."""
    sentence = f"has {actual} bytes; this server takes {limit} at most (--max-request-bytes), so shorten it"
    return _refused_whole("REQUEST_TOO_LARGE", sentence, limit=limit, actual=actual)


def too_many_fields(limit: int) -> ServiceError:
    """The message has more fields than any request that this server can answer."""
    sentence = (
        f"has more than {limit} fields; send fewer messages, stop strings or biases, and token ids packed, "
        "as proto3 does"
    )
    return _refused_whole("TOO_MANY_FIELDS", sentence, limit=limit)


def _refused_whole(reason: str, sentence: str, **figures: object) -> ServiceError:
    detail = bad_field("request", sentence)
    return refusal(_Code.INVALID_ARGUMENT, reason, f"request: {sentence}", detail, **figures)


def prompt_too_long(field: str, actual: int, limit: int) -> ServiceError:
    """The prompt has more than ``limit`` tokens, beside which a decoder has room for one more."""
    sentence = f"the prompt has {actual} tokens; this model takes {limit} at most, so shorten it"
    detail = bad_field(field, sentence)
    return refusal(_Code.INVALID_ARGUMENT, "PROMPT_TOO_LONG", sentence, detail, limit=limit, actual=actual)


def claim_too_large(actual: int, limit: int) -> ServiceError:
    """The request alone claims more tokens of the KV cache than its identity may: waiting won't help."""
    sentence = (
        f"claims {actual} tokens of the KV cache, by its prompt and max_tokens of each sample; requests of "
        f"this identity claim {limit} at most, so lower max_tokens or n, or shorten the prompt"
    )
    return _refused_whole("CLAIM_TOO_LARGE", sentence, limit=limit, actual=actual)


def queue_full(in_flight: int, limit: int, retry_seconds: float) -> ServiceError:
    """Admission: as many sequences as the server takes are in flight."""
    sentence = (
        f"the server has {in_flight} of at most {limit} sequences in flight; try again in about "
        f"{retry_seconds:.1f} s"
    )
    return _exhausted("QUEUE_FULL", sentence, retry_seconds, in_flight=in_flight, limit=limit)


def text_queue_full(jobs: int, retry_seconds: float) -> ServiceError:
    """As many long texts are tokenized, and wait for it, as the server takes."""
    sentence = (
        f"{jobs} long texts are being tokenized or wait for it, and no more are taken; try again in about "
        f"{retry_seconds:.1f} s"
    )
    return _exhausted("TEXT_QUEUE_FULL", sentence, retry_seconds, in_flight=jobs)


def limit_reached(sentence: str, reason: str, limit: int, retry_seconds: float) -> ServiceError:
    """The identity, a connection or the server has as many calls, or has used as many tokens, as it may."""
    return _exhausted(reason, sentence, retry_seconds, limit=limit)


def _exhausted(reason: str, sentence: str, retry_seconds: float, **figures: object) -> ServiceError:
    return refusal(_Code.RESOURCE_EXHAUSTED, reason, sentence, _retry(retry_seconds), **figures)


def request_id_in_use(request_id: str) -> ServiceError:
    """Another request in flight has this name."""
    sentence = (
        f"a request named {quote(request_id)} is in flight; wait for it to end, or choose another request_id"
    )
    resource = error_details_pb2.ResourceInfo(resource_type="request", resource_name=request_id)
    return refusal(_Code.ALREADY_EXISTS, "REQUEST_ID_IN_USE", sentence, resource, request_id=request_id)


def unauthenticated(sentence: str) -> ServiceError:
    """The call proves no identity, and the server asks for one."""
    return refusal(_Code.UNAUTHENTICATED, "UNAUTHENTICATED", sentence)


def switched_off(method: str, flag: str) -> ServiceError:
    """The operator has switched this method off."""
    sentence = f"this server does not answer {method} ({flag})"
    return refusal(_Code.UNIMPLEMENTED, "SWITCHED_OFF", sentence, setting=flag)


def not_offered(method: str) -> ServiceError:
    """Another's protocol has this method, and this server doesn't."""
    sentence = f"this server does not answer {method}; docs/protocols.md has the methods that it answers"
    return refusal(_Code.UNIMPLEMENTED, "NOT_OFFERED", sentence, method=method)


def priority_denied(priority: int, most: int) -> ServiceError:
    """The identity may not be that urgent."""
    sentence = f"is {priority}; requests of this identity have {most} at most"
    return refusal(
        *(_Code.PERMISSION_DENIED, "PRIORITY_DENIED", f"priority: {sentence}"),
        bad_field("priority", sentence),
        limit=most,
        actual=priority,
    )


def unknown_model(name: str, served: str) -> ServiceError:
    """The request names a model that this server doesn't have."""
    sentence = (
        f"this server has no model named {quote(name)}; it serves {served!r}, which an empty name means too"
    )
    resource = error_details_pb2.ResourceInfo(
        resource_type="model", resource_name=name[:_QUOTED], description=f"served: {served}"
    )
    return refusal(_Code.NOT_FOUND, "MODEL_NOT_FOUND", sentence, resource, served=served)


def unavailable(reason: str, sentence: str, retry_seconds: float) -> ServiceError:
    """The server can't work on this now: it loads, drains, or has lost its engine."""
    return refusal(_Code.UNAVAILABLE, reason, sentence, _retry(retry_seconds))


def engine_dead(reason: str) -> ServiceError:
    """The engine process ended, with everything that it worked on. ``reason`` is a sentence."""
    return unavailable("ENGINE_DEAD", f"the server has lost its engine: {reason}", _ENGINE_RETRY_SECONDS)


def no_chat_template(model: str, reason: str) -> ServiceError:
    """The model as served can't render a conversation. ``reason`` is what a sentence says of the model."""
    sentence = f"the model {model!r} {reason}; send the prompt as text or token ids"
    return refusal(_Code.FAILED_PRECONDITION, "NO_CHAT_TEMPLATE", sentence, model=model)


def no_tokenizer(model: str) -> ServiceError:
    """The model has nothing that turns text into tokens or back."""
    sentence = (
        f"the model {model!r} has no tokenizer: it takes prompts as token ids, stops at stop_token_ids, and "
        "answers with token ids"
    )
    return refusal(_Code.FAILED_PRECONDITION, "NO_TOKENIZER", sentence, model=model)


def stalled(seconds: float) -> ServiceError:
    """The client did not read its stream."""
    sentence = (
        f"the client did not read from the stream for {seconds:.0f} s, so the request was ended; read "
        "faster, or ask for fewer log probabilities"
    )
    return refusal(_Code.RESOURCE_EXHAUSTED, "STREAM_STALLED", sentence, seconds=seconds)


def internal(request_id: str) -> ServiceError:
    """A bug. The client learns the request's name only; the trace is in the log under it."""
    sentence = f"internal error; the server's log has the details under request {request_id}"
    named = error_details_pb2.RequestInfo(request_id=request_id)
    return ServiceError(_Code.INTERNAL, sentence, "INTERNAL", named)
