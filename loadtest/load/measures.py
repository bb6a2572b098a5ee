"""From records to figures, by the definitions of the field; see ``Record`` and ``Summary``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from loadtest.load.order_statistics import interval, needed
from loadtest.load.types import Spread, Summary, Targets
from loadtest.measuring.records import Record


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest of ascending ``ordered`` with at least ``share`` of them at or below it; NaN if empty."""
    if not ordered:
        return math.nan
    return ordered[max(0, math.ceil(share * len(ordered) - 1e-9) - 1)]


SHARES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
"""The reported percentiles, by name."""


def spread(values: Iterable[float | None], independent: bool = True) -> Spread:
    """A distribution in figures.

    Args:
        values: ``None`` is left out.
        independent: each comes from a request of its own, so that percentiles can have intervals.
    """
    ordered = sorted(value for value in values if value is not None)
    mean = sum(ordered) / len(ordered) if ordered else math.nan
    intervals = {name: interval(ordered, share) for name, share in SHARES.items()} if independent else {}
    return Spread(
        len(ordered),
        mean,
        **{name: percentile(ordered, share) for name, share in SHARES.items()},
        most=ordered[-1] if ordered else math.nan,
        intervals={name: ends for name, ends in intervals.items() if ends is not None},
        weak=weak(len(ordered)),
    )


def weak(count: int) -> list[str]:
    """Names of the percentiles that so many values cannot carry."""
    return [name for name, share in SHARES.items() if 0 < count < needed(share)]


def failures(records: Iterable[Record]) -> dict[str, int]:
    """How many requests failed, by what."""
    codes = (record.code if record.code != "OK" else "WRONG_LENGTH" for record in records if record.error)
    return dict(sorted(Counter(codes).items()))


def is_good(record: Record, targets: Targets) -> bool:
    """Whether a request was answered within every target; times count from when it should have been sent."""
    if record.error:
        return False
    ttft = None if record.ttft is None else record.ttft + record.delay
    pairs = (
        (ttft, targets.ttft),
        (record.tpot, targets.tpot),
        (record.latency + record.delay, targets.latency),
    )
    return all(value is None or target is None or value <= target for value, target in pairs)


def summarize(records: Sequence[Record], targets: Targets | None = None) -> Summary:
    """The figures of one run. Times are those of answered requests; failed ones count as failed.

    Raises:
        ValueError: there are no records.
    """
    if not records:
        raise ValueError("a run without requests has no figures")
    good = [record for record in records if not record.error]
    wall = max(record.ended for record in records) - min(record.sent for record in records)
    wall = max(wall, 1e-9)
    prompt_tokens = sum(record.prompt_tokens for record in good)
    output_tokens = sum(record.tokens for record in records)
    goodput = None
    if targets is not None and targets != Targets():
        goodput = sum(is_good(record, targets) for record in records) / len(records)
    return Summary(
        requests=len(records),
        failed=failures(records),
        wall=wall,
        request_rate=len(good) / wall,
        output_rate=output_tokens / wall,
        prompt_rate=prompt_tokens / wall,
        prompt_tokens=prompt_tokens,
        cached_tokens=sum(record.cached_tokens for record in good),
        output_tokens=output_tokens,
        concurrency=sum(record.latency for record in records) / wall,
        goodput=goodput,
        ttft=spread(record.ttft for record in good),
        tpot=spread(record.tpot for record in good),
        chunk_gap=spread((gap for record in good for gap in record.gaps), independent=False),
        latency=spread(record.latency for record in good),
        ttft_intended=spread(None if r.ttft is None else r.ttft + r.delay for r in good),
        latency_intended=spread(record.latency + record.delay for record in good),
        other_length=sum(record.tokens != record.expected_tokens for record in good),
        told_tokens=sum(record.told_tokens for record in good),
    )
