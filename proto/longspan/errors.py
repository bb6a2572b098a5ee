"""Errors of calls: one exception per gRPC status, with the server's rich details decoded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from grpc_status import rpc_status


class Violation(NamedTuple):
    """A field of the request that the server can't accept, by its path in the proto, and why."""

    field: str
    description: str

    def __str__(self) -> str:
        return f"{self.field}: {self.description}"


_BY_STATUS: dict[grpc.StatusCode, type[LongspanError]] = {}


class LongspanError(Exception):
    """A call that failed. Subclasses name the gRPC status; a status without one raises this class.

    Attributes:
        message: the server's sentence.
        code: the gRPC status.
        reason: a fixed name for the cause, like ``PROMPT_TOO_LONG``; empty where none was given.
        metadata: the cause's figures, like ``{"limit": "8192", "actual": "9000"}``.
        violations: the fields at fault.
        resource: name of what was not found, or exists already; empty where none was given.
        retry_after: seconds after which trying again makes sense; ``None`` where the server named none.
    """

    status: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN

    def __init_subclass__(cls, status: grpc.StatusCode | None = None) -> None:
        super().__init_subclass__()
        if status is not None:  # else it is a user's own
            cls.status = status
            _BY_STATUS[status] = cls

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        violations: Iterable[Violation] = (),
        resource: str = "",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.status
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)
        self.resource = resource
        self.retry_after = retry_after


class InvalidRequestError(LongspanError, ValueError, status=grpc.StatusCode.INVALID_ARGUMENT):
    """Something in the request is wrong, found here or by the server; ``violations`` names the fields."""


class NotFoundError(LongspanError, status=grpc.StatusCode.NOT_FOUND):
    """The server has no such model."""


class BusyError(LongspanError, status=grpc.StatusCode.RESOURCE_EXHAUSTED):
    """The queue is full or an identity's limit is reached; or the message is larger than the server takes, or
    the stream was not read.
    """


class UnauthenticatedError(LongspanError, status=grpc.StatusCode.UNAUTHENTICATED):
    """The server asks who calls, and does not know this token or certificate."""


class PermissionDeniedError(LongspanError, status=grpc.StatusCode.PERMISSION_DENIED):
    """The server knows who calls, and this is more than it may."""


class UnimplementedError(LongspanError, status=grpc.StatusCode.UNIMPLEMENTED):
    """The server is older than this call, or has switched it off."""


class UnavailableError(LongspanError, status=grpc.StatusCode.UNAVAILABLE):
    """No server answers, or it is loading, draining, or has lost its engine."""


class DeadlineError(LongspanError, TimeoutError, status=grpc.StatusCode.DEADLINE_EXCEEDED):
    """The timeout passed before the answer was complete; the server has stopped working on it."""


class CancelledError(LongspanError, status=grpc.StatusCode.CANCELLED):
    """The call was cancelled, by ``close`` or by the server."""


class AlreadyExistsError(LongspanError, status=grpc.StatusCode.ALREADY_EXISTS):
    """Another request in flight of the same identity has this ``request_id``."""


class PreconditionError(LongspanError, status=grpc.StatusCode.FAILED_PRECONDITION):
    """The server can't do this in the mode it runs in."""


class InternalError(LongspanError, status=grpc.StatusCode.INTERNAL):
    """A bug in the server; its log has the trace, under the request id that the message names."""


# How BoringSSL and gRPC tell of a handshake that failed, and of a server of HTTP/1.
_HANDSHAKES = {
    **dict.fromkeys(
        ("Expected SETTINGS frame", "http1.x server"),
        "what answers there does not speak gRPC; the port may be that of /metrics (port, --port)",
    ),
    "WRONG_VERSION_NUMBER": "it does not speak TLS, so leave that out",
    "CERTIFICATE_VERIFY_FAILED": "its certificate comes from none of the roots that are trusted (ca, --ca)",
    "Hostname Verification Check failed": "its certificate has another name; say which "
    "(server_name, --server-name)",
    "Socket closed": "it closed it; it may want TLS (tls=True, --tls), or a certificate of yours "
    "(cert and key, --cert and --key)",
}


def from_rpc_error(error: grpc.RpcError, target: str) -> LongspanError:
    """The exception for a failed call, synchronous or asyncio, to the server at ``target``."""
    call: Any = error  # grpc raises errors that are calls at the same time
    code: grpc.StatusCode = call.code()
    message: str = call.details() or ""
    details = _details(call)
    if code is grpc.StatusCode.UNAVAILABLE and message.startswith("failed to connect"):
        message = _not_connected(message.rpartition("last error: ")[2], target)
    elif code is grpc.StatusCode.DEADLINE_EXCEEDED and not details:
        message = (
            f"The server at {target} did not answer in time. Allow a longer timeout, or ask for fewer tokens."
        )
    return _BY_STATUS.get(code, LongspanError)(message or code.name, code=code, **details)


def _not_connected(cause: str, target: str) -> str:
    """Why there is no connection, and what to do about it."""
    for sign, sentence in _HANDSHAKES.items():
        if sign in cause:
            return f"There is no connection with the server at {target}: {sentence} ({cause})."
    return (
        f"No server answers at {target} ({cause}). "
        "Start one with `longspan serve`, or name another host or port."
    )


def _details(call: Any) -> dict[str, Any]:
    """The ``google.rpc`` details of a failed call, as keyword arguments of ``LongspanError``."""
    try:
        status = rpc_status.from_call(call)
    except (ValueError, DecodeError):  # details that contradict the status, or are none: the status stands
        return {}
    found: dict[str, Any] = {}
    for packed in status.details if status else ():
        if packed.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad = error_details_pb2.BadRequest()
            packed.Unpack(bad)
            found["violations"] = [Violation(v.field, v.description) for v in bad.field_violations]
        elif packed.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            packed.Unpack(info)
            found |= {"reason": info.reason, "metadata": dict(info.metadata)}
        elif packed.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            packed.Unpack(retry)
            found["retry_after"] = retry.retry_delay.ToTimedelta().total_seconds()
        elif packed.Is(error_details_pb2.ResourceInfo.DESCRIPTOR):
            resource = error_details_pb2.ResourceInfo()
            packed.Unpack(resource)
            found["resource"] = resource.resource_name
    return found
