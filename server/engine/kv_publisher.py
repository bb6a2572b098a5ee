"""Tells routers which prompts' pages are cached here: events over ZMQ, in the form of vLLM's.

A router like llm-d's keeps an index of them, and sends a prompt to the server that has most of its pages.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from typing import Any

import msgspec

from server.errors import RefusedError
from server.kv_messages import AllBlocksCleared, Event

log = logging.getLogger("longspan.kv_events")

# Batches that are kept for routers that have missed some.
_KEPT_BATCHES = 10_000
# A router that reads nothing must not cost memory: ZMQ drops batches beyond these, and the numbers show it.
_WAITING_BATCHES = 100_000
# Within which an answer to one that asks begins.
_REPLAY_SECONDS = 0.05
_END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)


class EventBatch(msgspec.Struct, array_like=True, frozen=True):
    """What happened since the batch before.

    Attributes:
        ts: seconds since 1970.
        events: in order.
        data_parallel_rank: 0; each server has one engine.
    """

    ts: float
    events: list[Event]
    data_parallel_rank: int = 0


class Publisher:
    """Publishes events by ZMQ, from a thread of its own.

    A message has the frames topic, sequence number (8 bytes, big endian) and batch (msgpack). A subscriber
    that misses a number asks ``replay`` for all batches from one on, as a ``DEALER`` with an empty frame and
    the number. The answer is each batch as (empty, number, batch), and then number -1 with an empty batch.

    Args:
        address: where to publish, a ZMQ endpoint.
        replay: where missed batches are asked for; none if empty.
        topic: the first frame.

    Raises:
        RefusedError: the package pyzmq is not installed, or an address can't be had.
    """

    def __init__(self, address: str, replay: str, topic: str) -> None:
        try:
            import zmq
        except ImportError as error:
            raise RefusedError(
                "--kv-events needs the package pyzmq: pip install 'longspan[kv-events]'"
            ) from error
        self._zmq: Any = zmq
        self._topic = topic.encode()
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=_KEPT_BATCHES)
        context = self._zmq.Context()
        self._publisher = self._bind(context, self._zmq.PUB, address)
        self._replay = self._bind(context, self._zmq.ROUTER, replay) if replay else None
        self._events.put(AllBlocksCleared())
        threading.Thread(target=self._publish, name="kv-events", daemon=True).start()

    def put(self, event: Event) -> None:
        """Publishes it soon."""
        self._events.put(event)

    def _bind(self, context: Any, kind: int, address: str) -> Any:
        socket = context.socket(kind)
        socket.setsockopt(self._zmq.SNDHWM, _WAITING_BATCHES)
        socket.setsockopt(self._zmq.LINGER, 0)
        try:
            socket.bind(address)
        except self._zmq.ZMQError as error:
            raise RefusedError(f"KV events can't be published at {address}: {error}") from error
        return socket

    def _publish(self) -> None:
        encoder = msgspec.msgpack.Encoder()
        number = 0
        try:
            while True:
                events = self._next()
                if events:
                    batch = encoder.encode(EventBatch(time.time(), events))
                    self._kept.append((number, batch))
                    self._publisher.send_multipart((self._topic, number.to_bytes(8, "big"), batch))
                    number += 1
                if self._replay is not None and self._replay.poll(0):
                    self._answer()
        except Exception:
            log.exception("KV events end: routers no longer learn which pages are here")

    def _next(self) -> list[Event]:
        """Events since the last ones; waits for one, for ever unless a replay may be asked for meanwhile."""
        events: list[Event] = []
        with contextlib.suppress(queue.Empty):
            events.append(self._events.get(timeout=None if self._replay is None else _REPLAY_SECONDS))
            while True:
                events.append(self._events.get_nowait())
        return events

    def _answer(self) -> None:
        assert self._replay is not None
        frames = self._replay.recv_multipart()
        if len(frames) != 3 or len(frames[2]) != 8:
            return  # not a request of this protocol; the address of who sent it is not even certain
        who, first = frames[0], int.from_bytes(frames[2], "big")
        for number, batch in self._kept:
            if number >= first:
                self._replay.send_multipart((who, b"", number.to_bytes(8, "big"), batch))
        self._replay.send_multipart((who, b"", _END_OF_REPLAY, b""))
