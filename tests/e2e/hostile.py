"""Messages that would each stop a server without limits, and what other clients see of it meanwhile.

They are as large as gRPC takes from a server with a large context.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import psutil
from google.protobuf.message import Message

from longspan.v1 import encoder_pb2, inference_pb2
from tests.e2e.server import Server
from tests.processes import Starving
from tests.wire_format import field

_MIB = 1 << 20
# The most that gRPC takes unless a setting says more, less what stands around the largest field.
_LARGEST = 8 * _MIB - 64

Generate, Tokenize = inference_pb2.GenerateRequest, inference_pb2.TokenizeRequest
Embed = encoder_pb2.EmbedRequest
Count, Detokenize = inference_pb2.CountTokensRequest, inference_pb2.DetokenizeRequest


_USER = {"role": "user", "content": "x"}

REFUSED: dict[str, tuple[str, Callable[[], bytes]]] = {
    "8 MiB of text": ("Generate", lambda: _bytes(Generate(text="word " * (_LARGEST // 5)))),
    "8 MiB of text to Tokenize": ("Tokenize", lambda: _bytes(Tokenize(text="word " * (_LARGEST // 5)))),
    "8 MiB of spaces": ("CountTokens", lambda: _bytes(Count(text=" " * _LARGEST))),
    "2.7 million invalid ids": ("Generate", lambda: field(3, field(1, b"\xff\xff\x7f" * 2_700_000))),
    "2.7 million ids to Detokenize": ("Detokenize", lambda: field(2, b"\x01\x01\x01" * 2_700_000)),
    "four million empty stop strings": (
        "Generate",
        lambda: b"\x12\x01x" + field(6, b"\x1a\x00" * 4_000_000),
    ),
    "1.6 million chat messages": ("Generate", lambda: field(4, field(1, b"\x0a\x01u") * 1_600_000)),
    "thousands of chat messages": ("Generate", lambda: _bytes(Generate(chat={"messages": [_USER] * 5000}))),
    "49,152 biases": (
        "Generate",
        lambda: _bytes(Generate(text="x", n=16, sampling={"logit_bias": dict.fromkeys(range(49_152), 1.0)})),
    ),
    "16 stop strings of 512 KB": (
        "Generate",
        lambda: _bytes(Generate(text="x", stop={"stop_strings": ["a" * 512_000] * 16})),
    ),
    "four million empty texts to Embed": ("Embed", lambda: field(2, b"") * 4_000_000),
}
"""Method and bytes of messages that no server takes, by what they are."""

TAKEN: dict[str, tuple[str, Callable[[inference_pb2.GetModelInfoResponse], bytes]]] = {
    "the largest text": ("Generate", lambda of: _bytes(Generate(text="a b" * (of.limits.text_bytes // 3)))),
    "the largest text to Tokenize": (
        "Tokenize",
        lambda of: _bytes(Tokenize(text="\xe9" * (of.limits.text_bytes // 2))),
    ),
    "the most spaces": ("CountTokens", lambda of: _bytes(Count(text=" " * of.limits.text_bytes))),
    "the largest text to Embed": (
        "Embed",
        lambda of: _bytes(Embed(texts=["a b" * (of.limits.text_bytes // 3)])),
    ),
    "a prompt that fills the context": (
        "Generate",
        lambda of: _bytes(Generate(token_ids={"ids": [5] * (of.context_length - 1)}, stop={"max_tokens": 1})),
    ),
    "a context of ids to Detokenize": (
        "Detokenize",
        lambda of: _bytes(Detokenize(token_ids=[5] * of.context_length)),
    ),
    "the most chat messages": (
        "CountTokens",
        lambda of: _bytes(Count(chat={"messages": [_USER] * of.limits.chat_messages})),
    ),
    "the most biases and samples": (
        "Generate",
        lambda of: _bytes(
            Generate(
                text="x",
                n=of.limits.n,
                sampling={"logit_bias": dict.fromkeys(range(min(of.limits.logit_bias, 300)), 1.0)},
                stop={"max_tokens": 8},
            )
        ),
    ),
    "the longest stop strings": (
        "Generate",
        lambda of: _bytes(
            Generate(
                text="a" * 40,
                stop={
                    "max_tokens": 32,
                    "stop_strings": ["a" * (of.limits.stop_string_bytes - 1) + "b"] * of.limits.stop_strings,
                },
            )
        ),
    ),
}
"""Method and bytes of messages as large as a generating model's limits allow, by what they are."""

PLAIN: dict[str, tuple[str, Callable[[inference_pb2.GetModelInfoResponse], bytes]]] = {
    "the most biases and samples": (
        "as many samples without biases",
        lambda of: _bytes(Generate(text="x", n=of.limits.n, stop={"max_tokens": 8})),
    ),
    "the longest stop strings": (
        "as many tokens without stop strings",
        lambda of: _bytes(Generate(text="a" * 40, stop={"max_tokens": 32})),
    ),
    "a prompt that fills the context": (
        "a prompt of at most 1000 tokens",
        lambda of: _bytes(
            Generate(
                token_ids={"ids": [5] * min(1000, of.context_length - 1)},
                stop={"max_tokens": 1},
            )
        ),
    ),
}
"""Of those in ``TAKEN`` that are computed, ordinary work of their kind: its name and bytes."""

_LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ENDLESS_TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% if m.content == 'loop' %}" + _LOOP + "{% endif %}{% endfor %}"
)
"""A chat template that does not end where a message is ``loop``."""


def chat(content: str) -> bytes:
    """A question as a conversation."""
    return _bytes(Generate(chat={"messages": [{"role": "user", "content": content}]}))


def _bytes(message: Message) -> bytes:
    return message.SerializeToString()


@dataclasses.dataclass
class Seen:
    """What others saw.

    Attributes:
        gaps: seconds between one delta of a stream and the next.
        health: seconds that health took to answer.
        metrics: seconds that a scrape took.
        held: the longest of all these, less the time for which other programs had the cores: a busy machine
            makes each of them as long as it likes.
        grown: bytes that the server process's memory grew by, at its largest.
    """

    gaps: list[float] = dataclasses.field(default_factory=list)
    health: list[float] = dataclasses.field(default_factory=list)
    metrics: list[float] = dataclasses.field(default_factory=list)
    held: float = 0.0
    grown: int = 0


@contextlib.contextmanager
def watched(server: Server, streams: int = 1, rest: float = 0.0) -> Iterator[Seen]:
    """Has streams, asks for health and metrics, and watches the memory, until the block ends.

    Args:
        server: to be watched.
        streams: so many at once.
        rest: seconds between a stream and the next; then streams are short, and the wait for the first token
            is a gap, too: what holds up a server is seen all the same, for a part of the processor time.
    """
    seen, end = Seen(), threading.Event()
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss
    starving = Starving(process.pid, server.engine_pid, os.getpid())

    def note(found: list[float], begun: float, ended: float) -> None:
        found.append(ended - begun)
        if ended - begun > seen.held:
            seen.held = max(seen.held, starving.less(begun, ended))

    def stream() -> None:
        with server.client() as client:
            while not end.is_set():
                last = time.monotonic() if rest else None
                for _ in client.stream("hello", max_tokens=20 if rest else 200, ignore_eos=True):
                    now = time.monotonic()
                    if last is not None:
                        note(seen.gaps, last, now)
                    last = now
                    if end.is_set():
                        break
                end.wait(rest)

    def health() -> None:
        with server.client() as client:
            while not end.wait(0.05):
                starving.look()
                begun = time.monotonic()
                assert client.health(timeout=60)
                note(seen.health, begun, time.monotonic())
                begun = time.monotonic()
                assert server.scrape()
                note(seen.metrics, begun, time.monotonic())
                seen.grown = max(seen.grown, process.memory_info().rss - before)

    with ThreadPoolExecutor(streams + 1) as pool:
        watchers = [pool.submit(watcher) for watcher in (*[stream] * streams, health)]
        try:
            while not (seen.gaps and seen.metrics) and not any(watcher.done() for watcher in watchers):
                time.sleep(0.01)
            yield seen
        finally:
            end.set()
        for watcher in watchers:
            watcher.result()


def send(
    address: str,
    method: str,
    payload: bytes,
    *,
    clients: int = 4,
    times: int = 2,
    seconds: float = 0.0,
    timeout: float = 100.0,
) -> Counter[str]:
    """Sends a message from several clients and counts the answers by status.

    Args:
        address: of the server.
        method: its name alone.
        payload: the message.
        clients: that send, each on a connection of its own.
        times: each sends it, at least.
        seconds: for so long each sends it again and again.
        timeout: seconds that an answer may take.
    """
    service = "EncoderService" if method == "Embed" else "InferenceService"

    def one(_: int) -> list[str]:
        begun = time.monotonic()
        statuses: list[str] = []
        options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
        with grpc.insecure_channel(address, options) as channel:
            call: Callable[..., bytes] = channel.unary_unary(f"/longspan.v1.{service}/{method}")
            while len(statuses) < times or time.monotonic() - begun < seconds:
                statuses.append(_status(call, payload, timeout))
        return statuses

    with ThreadPoolExecutor(clients) as pool:
        return Counter(status for statuses in pool.map(one, range(clients)) for status in statuses)


def _status(call: Callable[..., bytes], payload: bytes, timeout: float) -> str:
    try:
        call(payload, timeout=timeout)
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


def send_path(server: Server, path: bytes) -> None:
    """Calls a method by a path of any bytes, which gRPC's own clients can't send."""

    def literal(name: bytes, value: bytes) -> bytes:  # of HPACK (RFC 7541, section 6.2.2)
        return b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value

    def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return (
            struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload
        )

    fields = {b":method": b"POST", b":scheme": b"http", b":path": path, b":authority": b"x"}
    fields |= {b"content-type": b"application/grpc", b"te": b"trailers"}
    headers = b"".join(literal(name, value) for name, value in fields.items())
    begin = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"")
    with socket.create_connection((server.host, server.port), timeout=0.5) as connection:
        connection.sendall(begin + frame(1, 4, 1, headers) + frame(0, 1, 1, bytes(5)))
        with contextlib.suppress(TimeoutError, ConnectionError):
            while connection.recv(65536):
                pass
