"""HTTP/2 by hand (RFC 9113), header fields as plain literals (RFC 7541): what no client of gRPC sends."""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import NamedTuple

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, END_HEADERS, ACK = 1, 4, 1

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A frame."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


BEGIN = PREFACE + frame(SETTINGS, 0, 0)
"""What a client sends first."""


def field(name: bytes, value: bytes) -> bytes:
    """A header field that no table keeps (RFC 7541, section 6.2.2)."""
    return b"\x00" + _length(name) + name + _length(value) + value


def _length(text: bytes) -> bytes:
    """An integer with a prefix of 7 bits (RFC 7541, section 5.1)."""
    if len(text) < 127:
        return bytes([len(text)])
    left, encoded = len(text) - 127, b"\x7f"
    while left > 127:
        encoded += bytes([left & 127 | 128])
        left >>= 7
    return encoded + bytes([left])


def call_headers(path: bytes, content_type: bytes = b"application/grpc", **more: bytes) -> bytes:
    """The headers of a call."""
    fields = {b":method": b"POST", b":scheme": b"http", b":path": path, b":authority": b"x"}
    fields |= {b"content-type": content_type, b"te": b"trailers"}
    fields |= {name.replace("_", "-").encode(): value for name, value in more.items()}
    return b"".join(field(name, value) for name, value in fields.items())


def message(payload: bytes, compressed: bool = False) -> bytes:
    """A message of gRPC as the data of a stream."""
    return struct.pack(">?I", compressed, len(payload)) + payload


def call(stream: int, path: bytes, payload: bytes = b"", **headers: bytes) -> bytes:
    """A whole call with one message of up to 16 KiB."""
    return frame(HEADERS, END_HEADERS, stream, call_headers(path, **headers)) + frame(
        DATA, END_STREAM, stream, message(payload)
    )


def send(address: tuple[str, int], *parts: bytes, seconds: float = 1.0) -> bytes:
    """Sends bytes on a connection of its own; what came back until it was closed, or for so long."""
    received = b""
    with socket.create_connection(address, timeout=seconds) as connection, contextlib.suppress(OSError):
        for part in parts:
            connection.sendall(part)
        while got := connection.recv(1 << 16):
            received += got
    return received


class Frame(NamedTuple):
    """A frame that came."""

    kind: int
    flags: int
    stream: int
    payload: bytes


def frames(received: bytes) -> list[Frame]:
    """The whole frames of what came."""
    found = []
    while len(received) >= 9:
        size = int.from_bytes(received[:3])
        stream = int.from_bytes(received[5:9])
        found.append(Frame(received[3], received[4], stream, received[9 : 9 + size]))
        received = received[9 + size :]
    return found
