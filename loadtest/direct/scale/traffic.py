"""What users send, and what is counted of it: the same for simulated replicas and for real ones."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from loadtest.load.measures import percentile
from loadtest.load.types import Turn
from loadtest.load.workloads import Shape, sharegpt

_QUESTION, _TURNS = 32, 6
_DOCUMENTS = {"sessions": (256, 768), "long sessions": (1024, 3072)}
TRAFFIC = ("sharegpt", *_DOCUMENTS)
_LATE = 0.01
"""Seconds by which users may begin later in another draw. Real ones wake up about as late, and then other
calls share a step."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A closed loop on some replicas.

    Attributes:
        replicas: how many.
        policy: that routes; see ``Router``.
        traffic: ``sharegpt``, or sessions of questions about a document each.
        users: for each replica; each sends when its last call is answered, the first within ``warm_up / 2``.
        output_tokens: of an answer, or the most.
        warm_up: seconds that count nowhere.
        seconds: that count, after those.
        seed: of all draws.
        draw: another run with the same prompts in the same order: the router draws anew, and users begin
            some milliseconds later.
    """

    replicas: int
    policy: str
    traffic: str
    users: int = 8
    output_tokens: int = 128
    warm_up: float = 8.0
    seconds: float = 20.0
    seed: int = 0
    draw: int = 0

    @property
    def routing_seed(self) -> int:
        """Of the router."""
        return self.seed + 1_000_003 * self.draw

    def begins(self) -> list[float]:
        """When each user begins."""
        count = self.users * self.replicas
        late = random.Random(self.routing_seed) if self.draw else None
        gap = self.warm_up / 2 / count
        return [gap * user + (late.uniform(0, min(_LATE, gap)) if late else 0.0) for user in range(count)]

    def sessions(self, vocabulary: int) -> Iterator[list[Turn]]:
        """Sessions without end; a later turn's prompt goes on after all that was said before."""
        if self.traffic == "sharegpt":
            for batch in itertools.count():
                shape = Shape(256, 512, self.output_tokens, vocabulary, 1 << 30, self.seed * 7919 + batch)
                yield from (list(session.turns) for session in sharegpt(shape))
        rng, ids = random.Random(self.seed), range(min(1000, vocabulary // 2), vocabulary)
        least, most = _DOCUMENTS[self.traffic]
        while True:
            lengths = [rng.randint(least, most), *[_QUESTION] * (_TURNS - 1)]
            yield [Turn(rng.choices(ids, k=length), self.output_tokens) for length in lengths]


@dataclass(frozen=True, slots=True)
class Figures:
    """What came out, of one run or in the mean of several.

    Attributes:
        rate: output tokens per second of all replicas.
        ttft: seconds to the first token, mean.
        ttft_p50: median.
        ttft_p90: 90th percentile.
        ttft_p95: 95th percentile.
        hits: share of prompt tokens that were found in a prefix cache.
        calls: that ended in the time that counts.
        step: processor seconds of a step of the engines, mean of all since the beginning.
    """

    rate: float
    ttft: float
    ttft_p50: float
    ttft_p90: float
    ttft_p95: float
    hits: float
    calls: float
    step: float


class Tally:
    """Counts what falls into the seconds of a scenario that count."""

    def __init__(self, scenario: Scenario) -> None:
        self._begin, self._end = scenario.warm_up, scenario.warm_up + scenario.seconds
        self._tokens = self._prompt = self._cached = self._calls = 0
        self._ttft: list[float] = []

    def token(self, now: float, count: int) -> None:
        """So many output tokens have come to users."""
        if self._begin <= now < self._end:
            self._tokens += count

    def first(self, now: float, sent: float) -> None:
        """The first of a call that was sent then."""
        if self._begin <= now < self._end:
            self._ttft.append(now - sent)

    def ended(self, now: float, prompt: int, cached: int) -> None:
        """A call has ended, of whose prompt tokens so many were found."""
        if self._begin <= now < self._end:
            self._prompt, self._cached, self._calls = (
                self._prompt + prompt,
                self._cached + cached,
                self._calls + 1,
            )

    def figures(self, step: float) -> Figures:
        """The results.

        Args:
            step: processor seconds of a step.

        Raises:
            ValueError: nothing was answered in the time that counts.
        """
        if not self._ttft or not self._prompt:
            raise ValueError("no call was answered in the time that counts; give it more seconds")
        times = sorted(self._ttft)
        return Figures(
            self._tokens / (self._end - self._begin),
            statistics.fmean(times),
            percentile(times, 0.5),
            percentile(times, 0.9),
            percentile(times, 0.95),
            self._cached / self._prompt,
            self._calls,
            step,
        )
