"""HTTP/2 that no client of gRPC sends, by what it is: the parts that one connection sends in turn."""

from __future__ import annotations

import functools
import gzip
import random
from collections.abc import Callable, Iterable

from tests.e2e import http2
from tests.e2e.http2 import BEGIN, CONTINUATION, END_HEADERS, HEADERS, PING, RST_STREAM, SETTINGS, frame

_CHECK = b"/grpc.health.v1.Health/Check"
_ASK = b"/longspan.v1.InferenceService/Generate"
_INFO = b"/longspan.v1.InferenceService/GetServerInfo"
_BEGUN = BEGIN + frame(HEADERS, 0, 1, http2.call_headers(_CHECK))
_CANCEL = (8).to_bytes(4)


def _calls(count: int, *parts: Callable[[int], bytes]) -> Iterable[bytes]:
    """So many calls, of these parts by the number of the stream."""
    for begin in range(0, count, 100):
        streams = range(1 + 2 * begin, 1 + 2 * min(begin + 100, count), 2)
        yield b"".join(part(stream) for stream in streams for part in parts)


@functools.cache
def _bomb() -> bytes:
    """A message of 16 MiB that takes a thousandth of that."""
    return http2.message(gzip.compress(bytes(16 << 20)), compressed=True)


def _compressed(stream: int) -> bytes:
    headers = http2.call_headers(_ASK, grpc_encoding=b"gzip")
    data = _bomb()
    pieces = [data[at : at + 16384] for at in range(0, len(data), 16384)]
    return frame(HEADERS, END_HEADERS, stream, headers) + b"".join(
        frame(http2.DATA, http2.END_STREAM * (piece is pieces[-1]), stream, piece) for piece in pieces
    )


ABUSES: dict[str, Callable[[int], Iterable[bytes]]] = {
    "a header without end": lambda n: [
        _BEGUN,
        *[frame(CONTINUATION, 0, 1, http2.field(b"x", b"y" * 1000) * 15)] * n,
    ],
    "a header of many names": lambda n: [
        _BEGUN,
        *[frame(CONTINUATION, 0, 1, http2.field(b"y" * 1000, b"x") * 15)] * n,
    ],
    "a value without end": lambda n: [
        BEGIN + frame(HEADERS, 0, 1, http2.call_headers(_CHECK) + b"\0\1a\x7f\xff\xff\xff\x7f"),
        *[frame(CONTINUATION, 0, 1, b"a" * 16000)] * n,
    ],
    "empty continuations": lambda n: [_BEGUN, *[frame(CONTINUATION, 0, 1) * 1000] * n],
    "settings": lambda n: [BEGIN, *[frame(SETTINGS, 0, 0, b"\0\4\0\1\0\0") * 100] * n],
    "pings": lambda n: [BEGIN, *[frame(PING, 0, 0, bytes(8)) * 100] * n],
    "rapid resets": lambda n: [
        BEGIN,
        *_calls(n, lambda s: http2.call(s, _INFO), lambda s: frame(RST_STREAM, 0, s, _CANCEL)),
    ],
    "resets of generations": lambda n: [
        BEGIN,
        *_calls(n, lambda s: http2.call(s, _ASK, b"\x12\1x"), lambda s: frame(RST_STREAM, 0, s, _CANCEL)),
    ],
    "large headers": lambda n: [
        BEGIN,
        *_calls(n, lambda s: frame(HEADERS, END_HEADERS, s, http2.call_headers(_CHECK, x=b"y" * 15000))),
    ],
    "calls without a message": lambda n: [
        BEGIN,
        *_calls(n, lambda s: frame(HEADERS, END_HEADERS, s, http2.call_headers(_INFO))),
    ],
    "no room for answers": lambda n: [
        http2.PREFACE + frame(SETTINGS, 0, 0, b"\0\4\0\0\0\0"),
        *_calls(n, lambda s: http2.call(s, _INFO)),
    ],
    "unknown methods": lambda n: [BEGIN, *_calls(n, lambda s: http2.call(s, b"/x/%d" % s))],
    "other kinds of content": lambda n: [
        BEGIN,
        *_calls(n, lambda s: http2.call(s, _INFO, content_type=b"text/html")),
    ],
    "paths that are none": lambda n: [
        BEGIN,
        *_calls(n, *(lambda s, p=p: http2.call(s, p) for p in (b"/a",))),
        *(http2.call(100_001 + 2 * at, path) for at, path in enumerate((b"", b"x", b"//", b"/\0", b"/%ff"))),
    ],
    "messages that expand": lambda n: [BEGIN, *(_compressed(1 + 2 * at) for at in range(max(1, n // 50)))],
    "windows beyond the largest": lambda n: [
        BEGIN,
        *[frame(http2.WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff")] * n,
    ],
    "unknown frames": lambda n: [BEGIN, *[frame(77, 0, 0, bytes(16000))] * n],
    "no HTTP/2": lambda n: [random.Random(n).randbytes(1000 * n)],
    "HTTP/1.1": lambda n: [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * n],
}
"""Each takes how much of it."""
