"""Senders of requests, for every kind of target."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

from loadtest.load.over_grpc import GrpcSender
from loadtest.load.targets import Server, Target
from loadtest.load.types import Turn
from loadtest.measuring.records import Record


class Sender(Protocol):
    """A sender of requests to one target."""

    async def send(self, turn: Turn, record: Record) -> str:
        """Sends one request, fills in its record, and gives the answer's text."""
        ...

    async def __aenter__(self) -> Self:
        """Connects."""
        ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes."""
        ...

    def finish(self) -> None:
        """Completes the records, once nothing is timed any more."""
        ...


def sender(target: Target) -> Sender:
    """The sender for ``target``."""
    if isinstance(target, Server):
        return GrpcSender(target)
    from loadtest.load.over_http import HttpSender  # its library need not be installed

    return HttpSender(target)
