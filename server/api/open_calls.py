"""How many calls may be open at a time: of all, and of those that stay open for as long as a client likes."""

from __future__ import annotations

import asyncio
from collections import Counter

from server.api import errors
from server.observe import orca_messages

_CHECK = "/grpc.health.v1.Health/Check"
_RETRY_SECONDS = 1.0

# An open call takes some 30 KB, also one whose client never sends its message.
MOST_CALLS = 8192
"""Beside those of requests that may wait (``--max-queue``)."""

MOST_CHECKS = 1024
"""Of health, which count by themselves, so that other calls can't keep them out."""

# A client asks for health by one stream per connection; a proxy that brings several, by as many.
MOST_STAYING = {
    "/grpc.health.v1.Health/Watch": (64, 4096),
    "/inference.GRPCInferenceService/ModelStreamInfer": (64, 4096),
    "/vllm.grpc.engine.VllmEngine/GetTokenizer": (16, 256),
    "/vllm.grpc.engine.VllmEngine/SubscribeKvEvents": (16, 256),
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": (16, 256),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": (16, 256),
    f"/{orca_messages.SERVICE}/StreamCoreMetrics": (16, 256),
}
"""Streams of a method at a time: of one connection, and of all."""


class OpenCalls:
    """Counts calls from their begin to their end.

    Args:
        more: calls that may be open beside ``MOST_CALLS``.
    """

    def __init__(self, more: int) -> None:
        self._most = MOST_CALLS + more
        self._open: Counter[str] = Counter()

    def enter(self, method: str) -> None:
        """Counts a call, before its message is received, until this task, which serves it, ends.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED where as many are open as may be.
        """
        kind, most = ("checks of health", MOST_CHECKS) if method == _CHECK else ("calls", self._most)
        if self._open[kind] >= most:
            raise _refusal(f"{most} {kind} are open here, the most at a time; try later", most)
        self._count(kind)

    def stay(self, method: str, connection: str) -> None:
        """Counts a stream of a method that ends when its client likes, as ``enter`` does.

        Args:
            method: its full name; others than those of ``MOST_STAYING`` are not counted.
            connection: names its connection.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED where the connection, or all together, have as many as may be.
        """
        if method not in MOST_STAYING:
            return
        name = method.rpartition("/")[2]
        of_one, of_all = MOST_STAYING[method]
        for key, most, whose in (
            (f"{method} {connection}", of_one, "this connection has"),
            (method, of_all, "the server has"),
        ):
            if self._open[key] >= most:
                raise _refusal(
                    f"{whose} {most} open streams of {name}, the most at a time; end some of them", most
                )
        self._count(method, f"{method} {connection}")

    def _count(self, *keys: str) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.update(keys)
        task.add_done_callback(lambda _: self._end(keys))

    def _end(self, keys: tuple[str, ...]) -> None:
        self._open.subtract(keys)
        for key in keys:
            if not self._open[key]:
                del self._open[key]


def _refusal(sentence: str, most: int) -> errors.ServiceError:
    return errors.limit_reached(sentence, "TOO_MANY_CALLS", most, _RETRY_SECONDS)
