"""The data of a load test: sessions, arrival times, outcomes and figures. Nothing here sends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


class LoadTestError(Exception):
    """A load test can't be made as it is asked for, or failed; the message says why and what to change."""


Message = tuple[str, str]
"""A turn of a conversation: role and content."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a session.

    Attributes:
        prompt: token ids, a text, or the messages that a conversation goes on with.
        output_tokens: to generate, exactly: end-of-sequence tokens are ignored.
    """

    prompt: list[int] | str | list[Message]
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Session:
    """Requests that one user sends one after the other.

    A later turn of messages goes out with all earlier ones and their answers before it.

    Attributes:
        index: its place in the workload.
        turns: at least one.
    """

    index: int
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A workload as it is asked for.

    Attributes:
        name: of a workload, or a file.
        prompt_tokens: of a prompt, or the most; ``None`` for 128.
        output_tokens: of an output, or the most; ``None`` for 128, or the answers' own in a ShareGPT file.
        groups: prefixes of ``shared-prefix``.
        prefix_tokens: of each.
        turns: questions of a conversation; ``None`` for 4, or in a ShareGPT file only the first.
        most_prompt_tokens: of a ShareGPT file's prompts, longer ones are left out; as in vLLM's benchmark.
        most_total_tokens: of its prompts and outputs together, longer sessions are cut or left out; likewise.
    """

    name: str = "fixed"
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    groups: int = 4
    prefix_tokens: int = 512
    turns: int | None = None
    most_prompt_tokens: int = 1024
    most_total_tokens: int = 2048


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """A fixed number of users, each beginning a session when its last one has ended.

    Attributes:
        concurrency: users.
    """

    concurrency: int
    kind: Literal["closed"] = "closed"


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """Sessions begin at times drawn before the run, independent of the server.

    Attributes:
        rate: sessions per second.
        burstiness: shape of the gamma distribution of the gaps: 1 is a Poisson process, below 1 is burstier,
            infinity is a fixed gap.
    """

    rate: float
    burstiness: float = 1.0
    kind: Literal["open"] = "open"


Load = ClosedLoop | OpenLoop


@dataclass(frozen=True, slots=True)
class Worker:
    """Figures of one client process.

    Attributes:
        cpu_share: processor time over wall time of the run; 1 is one core all the time.
        loop_lag: 99th percentile of how late its event loop woke up, in seconds.
    """

    cpu_share: float
    loop_lag: float


@dataclass(frozen=True, slots=True)
class Spread:
    """A distribution in figures; NaN where there was nothing to measure.

    Attributes:
        count: values.
        mean: arithmetic.
        p50: median.
        p90: percentile.
        p95: percentile.
        p99: percentile.
        most: the largest.
        intervals: by name of the percentile the ends of its 95% interval, of independent requests; names
            that the sample is too small for are left out, and there are none where values depend on one
            another.
        weak: names of percentiles that the sample cannot carry: they are its largest value or near it; see
            ``order_statistics.needed``.
    """

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    most: float
    intervals: dict[str, list[float]] = field(default_factory=dict)
    weak: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Targets:
    """Latency targets of a good request, in seconds; ``None`` for no limit.

    Attributes:
        ttft: time to first token, from the intended time of sending.
        tpot: time per output token.
        latency: from the intended time of sending to the end.
    """

    ttft: float | None = None
    tpot: float | None = None
    latency: float | None = None


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of one run. Rates are per second of the run's wall time.

    Attributes:
        requests: sent.
        failed: of those, by code; answers of the wrong length count as ``WRONG_LENGTH``.
        wall: from the first request sent to the last stream's end, in seconds.
        request_rate: requests answered.
        output_rate: generated tokens.
        prompt_rate: prompt tokens of answered requests.
        prompt_tokens: of answered requests.
        cached_tokens: of those, found in the prefix cache.
        output_tokens: received, those of failed requests included.
        concurrency: requests in flight, on average.
        goodput: requests that met every target, of all sent; ``None`` without targets.
        ttft: time to first token.
        tpot: time per output token.
        chunk_gap: between messages, of all requests together.
        latency: from sending to the last message.
        ttft_intended: time to first token from the intended time of sending.
        latency_intended: from then to the last message.
        other_length: answers of another length than asked for, where that is no failure: an endpoint may not
            know how to go on past the end of an answer.
        told_tokens: output tokens by the endpoint's own count, where the client counts them itself; else 0.
    """

    requests: int
    failed: dict[str, int]
    wall: float
    request_rate: float
    output_rate: float
    prompt_rate: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    concurrency: float
    goodput: float | None
    ttft: Spread
    tpot: Spread
    chunk_gap: Spread
    latency: Spread
    ttft_intended: Spread
    latency_intended: Spread
    other_length: int = 0
    told_tokens: int = 0
