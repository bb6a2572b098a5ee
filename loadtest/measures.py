"""What one request did over time, and the figures that many of them give.

Times are seconds of one monotonic clock in the client's process. Definitions, as the field uses them:
TTFT is from sending the request to the first token; TPOT is ``(last - first) / (tokens - 1)`` and is not
defined for a single token; latency is from sending to the last event.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Record:
    """One request as its client saw it.

    Attributes:
        sent: when it was sent.
        arrivals: when each message with tokens arrived, and how many tokens it had.
        ended: when its stream ended.
        prompt_tokens: of the prompt, by the server's count.
        error: the error's sentence; empty if it succeeded.
    """

    sent: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    ended: float = 0.0
    prompt_tokens: int = 0
    error: str = ""

    @property
    def tokens(self) -> int:
        """Tokens received."""
        return sum(count for _, count in self.arrivals)

    @property
    def ttft(self) -> float | None:
        """Time to first token in seconds; ``None`` if there was none."""
        return self.arrivals[0][0] - self.sent if self.arrivals else None

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first, in seconds; ``None`` for fewer than two tokens."""
        if self.tokens < 2:
            return None
        return (self.arrivals[-1][0] - self.arrivals[0][0]) / (self.tokens - 1)


@dataclass(frozen=True, slots=True)
class Summary:
    """Figures of one run; times in seconds, rates per second of wall time.

    Attributes:
        requests: sent.
        failed: of those.
        wall: from the first request sent to the last stream's end.
        output_rate: generated tokens per second.
        prompt_rate: prompt tokens per second.
        ttft: median and 99th percentile.
        tpot: median and 99th percentile.
    """

    requests: int
    failed: int
    wall: float
    output_rate: float
    prompt_rate: float
    ttft: tuple[float, float]
    tpot: tuple[float, float]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of ``values`` do not exceed; NaN if there are none."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1)]


def summarize(records: Sequence[Record]) -> Summary:
    """The figures of one run.

    Raises:
        ValueError: there are no records.
    """
    if not records:
        raise ValueError("a run without requests has no figures")
    good = [record for record in records if not record.error]
    wall = max(record.ended for record in records) - min(record.sent for record in records)
    ttft = [record.ttft for record in good if record.ttft is not None]
    tpot = [record.tpot for record in good if record.tpot is not None]
    return Summary(
        requests=len(records),
        failed=len(records) - len(good),
        wall=wall,
        output_rate=sum(record.tokens for record in records) / wall,
        prompt_rate=sum(record.prompt_tokens for record in good) / wall,
        ttft=(statistics.median(ttft) if ttft else float("nan"), percentile(ttft, 0.99)),
        tpot=(statistics.median(tpot) if tpot else float("nan"), percentile(tpot, 0.99)),
    )
