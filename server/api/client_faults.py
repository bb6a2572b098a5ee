"""Calls that end by their client's own doing. Balancers are not told of them: clients could steer by them."""

from __future__ import annotations

import grpc

from server.api.errors import ServiceError

# No server would answer these.
_CODES = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNIMPLEMENTED,
}
# A caller's own limits, and a reader that stalls. Other RESOURCE_EXHAUSTED tell of a full server.
_REASONS = {"REQUESTS_IN_FLIGHT", "TOKENS_PER_MINUTE", "KV_TOKENS", "VECTOR_BYTES", "STREAM_STALLED"}


def of_client(code: grpc.StatusCode, error: ServiceError | None) -> bool:
    """Whether a call ended so by what its client did.

    Args:
        code: its status.
        error: with which it was refused or failed, if it was.
    """
    return code in _CODES or (error is not None and error.reason in _REASONS)
