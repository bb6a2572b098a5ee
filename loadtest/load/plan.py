"""The plan of a load test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from loadtest.load.sweep import Sweep
from loadtest.load.targets import Endpoint, Server, Target
from loadtest.load.types import ClosedLoop, Load, Session, Targets
from longspan import ConnectOptions

PATIENCE = 600.0
"""Seconds without any message after which a server hangs, unless it is said otherwise: more than a small
machine takes for a batch of long prompts, of which it answers none before it has computed all."""

# How long an open loop lasts, unless the number of its sessions is given.
_OPEN_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan.

    Attributes:
        host: of the server.
        port: its gRPC port.
        connect: how to reach it, ``longspan.ConnectOptions``.
        metrics_url: where its metrics are; ``None`` to leave them out.
        workload: name and what it was drawn with, for the result.
        draw: makes so many sessions from a seed. Each run gets its own, so that the server's prefix cache
            knows nothing of it from the one before.
        loads: how to send them, one run each; a ``Sweep`` decides as it goes.
        sessions: of each run; ``None`` for a number that suits the load.
        warmup: sessions sent before each run; ``None`` for a number that suits the load.
        workers: client processes.
        seed: of workload and arrivals.
        most_seconds: no session begins later than this in a run.
        targets: of a good request.
        repeats: of every load, there and back.
        endpoint: a second target, which takes turns with the server.
        endpoint_only: the endpoint is the only target.
        patience: seconds without a message, while requests wait, after which a target hangs.
    """

    host: str
    port: int
    metrics_url: str | None
    workload: dict[str, Any]
    draw: Callable[[int, int], list[Session]]
    loads: list[Load] | Sweep
    sessions: int | None = None
    warmup: int | None = None
    workers: int = 1
    seed: int = 0
    most_seconds: float | None = None
    targets: Targets | None = None
    repeats: int = 1
    endpoint: Endpoint | None = None
    endpoint_only: bool = False
    patience: float = PATIENCE
    connect: ConnectOptions = field(default_factory=ConnectOptions)

    @property
    def measured(self) -> list[Target]:
        """The targets."""
        server = [] if self.endpoint_only else [Server(self.host, self.port, self.connect)]
        return [*server, *([self.endpoint] if self.endpoint else [])]

    def counts(self, load: Load) -> tuple[int, int, int]:
        """Sessions of a run, and of its warm-up, and users of the warm-up."""
        users = load.concurrency if isinstance(load, ClosedLoop) else 4
        usual = max(16, 4 * users if isinstance(load, ClosedLoop) else round(_OPEN_SECONDS * load.rate))
        warmup = users if self.warmup is None else self.warmup
        # Fewer sessions than users would measure fewer users.
        least = users if isinstance(load, ClosedLoop) else 1
        return max(self.sessions or usual, least), warmup, max(1, min(users, warmup))
