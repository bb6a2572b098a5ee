"""What a replica answers Ray's proxy: messages of gRPC, and how the call ends, as bytes.

Ray hands on a code and a sentence of a failed call, and no trailers, and of no call the headers.
"""

from __future__ import annotations

from collections.abc import Sequence

import grpc
import msgspec

from server.api.errors import ServiceError

Pairs = Sequence[tuple[str, str | bytes]]
"""Metadata as gRPC has it: bytes where the name ends in ``-bin``."""

Packed = list[tuple[str, bytes]]
"""The same in a frame, all of it bytes."""


class End(msgspec.Struct, array_like=True, frozen=True):
    """The end of a call.

    Attributes:
        code: the number of its status.
        details: the sentence of it.
        trailers: its trailing metadata.
    """

    code: int = 0
    details: str = ""
    trailers: Packed = []


class Frame(msgspec.Struct, array_like=True):
    """A part of an answer.

    Attributes:
        headers: the initial metadata, in the first frame that has any.
        messages: serialized, in order.
        end: in the last frame.
    """

    headers: Packed | None = None
    messages: list[bytes] = []
    end: End | None = None

    def SerializeToString(self) -> bytes:  # noqa: N802 (Ray calls it, as of a message)
        """Its bytes."""
        return msgspec.msgpack.encode(self)


def read_frame(payload: bytes) -> Frame:
    """The frame that was serialized."""
    return _decode(payload)


def refusal(error: ServiceError) -> Frame:
    """The answer that is an error alone."""
    return Frame(end=end_of(error.status()))


def end_of(status: grpc.Status, trailers: Pairs = ()) -> End:
    """The end of a call with this status.

    Args:
        status: as of ``ServiceError.status``.
        trailers: further trailing metadata.
    """
    given = tuple(status.trailing_metadata or ())
    return End(status.code.value[0], status.details, pack((*trailers, *given)))


def pack(pairs: Pairs) -> Packed:
    """Metadata for a frame."""
    return [(key, value if isinstance(value, bytes) else value.encode()) for key, value in pairs]


def unpack(packed: Packed) -> Pairs:
    """Metadata of a frame for gRPC."""
    return tuple((key, value if key.endswith("-bin") else value.decode()) for key, value in packed)


_decode = msgspec.msgpack.Decoder(Frame).decode
