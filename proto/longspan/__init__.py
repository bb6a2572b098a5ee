"""Longspan's client: ``from longspan import Client, AsyncClient``. Needs grpcio and protobuf, nothing more.

The messages and stubs of the service itself are in ``longspan.v1``.
"""

from longspan.aio import AsyncClient, AsyncStream
from longspan.channel import DEFAULT_HOST, DEFAULT_PORT, ConnectOptions
from longspan.client import Client, Stream
from longspan.encoding import EmbedOptions, FillMaskOptions, ScoreOptions, Texts
from longspan.errors import (
    AlreadyExistsError,
    BusyError,
    CancelledError,
    DeadlineError,
    InternalError,
    InvalidRequestError,
    LongspanError,
    NotFoundError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
    Violation,
)
from longspan.request import GenerateOptions, Message, Prompt
from longspan.results import Completion, Delta, FinishReason, Generation

__all__ = [
    "DEFAULT_HOST",
    "DEFAULT_PORT",
    "AlreadyExistsError",
    "AsyncClient",
    "AsyncStream",
    "BusyError",
    "CancelledError",
    "Client",
    "Completion",
    "ConnectOptions",
    "DeadlineError",
    "Delta",
    "EmbedOptions",
    "FillMaskOptions",
    "FinishReason",
    "GenerateOptions",
    "Generation",
    "InternalError",
    "InvalidRequestError",
    "LongspanError",
    "Message",
    "NotFoundError",
    "PermissionDeniedError",
    "PreconditionError",
    "Prompt",
    "ScoreOptions",
    "Stream",
    "Texts",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
    "Violation",
]
