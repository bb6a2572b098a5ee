"""One request as its client saw it, for every kind of sender."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field


@dataclass(slots=True)
class Record:
    """One request as its client saw it. Times are seconds of the machine's monotonic clock.

    Attributes:
        session: index of its session.
        turn: its place in the session.
        intended: when it should have been sent: drawn beforehand in an open loop, else when it was sent.
        sent: when it was sent.
        arrivals: when each message with tokens arrived, and how many tokens it had.
        ended: when its stream ended.
        prompt_tokens: by the server's count.
        cached_tokens: of those, found in the server's prefix cache.
        expected_tokens: output tokens asked for.
        told_tokens: output tokens by the server's own count, where the client counts them itself; else 0.
        code: gRPC status, or what an HTTP endpoint did; ``OK`` if it was answered.
        error: the error's sentence; empty if it was answered.
    """

    session: int
    turn: int
    intended: float
    sent: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    ended: float = math.nan
    prompt_tokens: int = 0
    cached_tokens: int = 0
    expected_tokens: int = 0
    told_tokens: int = 0
    code: str = "OK"
    error: str = ""

    @property
    def tokens(self) -> int:
        """Tokens received."""
        return sum(count for _, count in self.arrivals)

    @property
    def ttft(self) -> float | None:
        """Seconds from sending to the first token; ``None`` if there was none."""
        return self.arrivals[0][0] - self.sent if self.arrivals else None

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first: (last token's time - first token's) / (tokens - 1).

        The definition of the field's benchmarks (vLLM's and SGLang's). Tokens that share a message share its
        time, so that all but one token of a first message of several count as made in no time; a server that
        holds tokens back to send them at once shows it in its time to first token. ``None`` where all
        tokens came in one message: its time says nothing of them.
        """
        if len(self.arrivals) < 2:
            return None
        return (self.arrivals[-1][0] - self.arrivals[0][0]) / (self.tokens - 1)

    @property
    def latency(self) -> float:
        """Seconds from sending to the last message."""
        return self.ended - self.sent

    @property
    def delay(self) -> float:
        """How late it was sent."""
        return self.sent - self.intended

    @property
    def gaps(self) -> list[float]:
        """Seconds between messages with tokens."""
        times = [when for when, _ in self.arrivals]
        return [after - before for before, after in itertools.pairwise(times)]
