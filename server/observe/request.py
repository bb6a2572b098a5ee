"""One generation request's times and token counts, for its client and for the metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from longspan.v1 import types_pb2
from server.messages import SequenceOutput
from server.observe.metrics import Metrics


@dataclass(slots=True)
class _Sample:
    tokens: int = 0
    first: float = 0.0
    last: float = 0.0
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class Moments:
    """Times of a request's events, in monotonic seconds; ``None`` for events that did not happen.

    Attributes:
        arrival: it came.
        started: the engine began.
        first: its first token.
        last: its last token.
        end: its answer was complete, or it was cut off.
    """

    arrival: float
    started: float | None
    first: float | None
    last: float | None
    end: float

    def phases(self) -> list[tuple[str, float, float]]:
        """Queue, prefill and decode, as far as it came: name, begin, end. Where one ends the next begins."""
        phases = [("queue", self.arrival, self.end if self.started is None else self.started)]
        if self.started is not None:
            phases.append(("prefill", self.started, self.end if self.first is None else self.first))
        if self.first is not None and self.last is not None:
            phases.append(("decode", self.first, self.last))
        return phases


class RequestRecord:
    """Times and token counts of a request. All times are monotonic; the engine's come from the same clock.

    ``spend`` is told each number of tokens that were generated; of a beam search, of all of its beams.

    Attributes:
        prompt_tokens: tokens of the prompt.
        cached_tokens: those found in the prefix cache.
        draft_tokens: tokens drafted for it.
        accepted_draft_tokens: those of them that were output.
    """

    def __init__(
        self,
        metrics: Metrics,
        samples: int,
        arrival: float,
        spend: Callable[[int], None],
        *,
        searches: bool = False,
    ) -> None:
        labels = metrics.labels()
        self._metrics = metrics
        self._labels = labels
        self._arrival = arrival
        self._spend = spend
        self._searches = searches
        self._started: float | None = None
        self._samples = [_Sample() for _ in range(samples)]
        self._gap = metrics.inter_token_latency.labels(*labels)
        self._generated = metrics.generation_tokens.labels(*labels)
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.draft_tokens = 0
        self.accepted_draft_tokens = 0

    def begin(self, prompt_tokens: int, output: SequenceOutput | None) -> None:
        """The engine has begun, by the first output of any sample, or ended before."""
        self.prompt_tokens = prompt_tokens
        if output is not None:
            self._started = output.started
            self.cached_tokens = output.cached_tokens
        self._metrics.prompt_tokens.labels(*self._labels).inc(prompt_tokens)

    def tokens(self, index: int, count: int, when: float, preemptions: int) -> None:
        """Sample ``index`` got ``count`` tokens in the step that ended at ``when``."""
        sample = self._samples[index]
        sample.preemptions = preemptions
        if not count:
            return
        self._generated.inc(count)
        if not self._searches:
            self._spend(count)
        observed = count
        gap = 0.0
        if sample.tokens:
            gap = (when - sample.last) / count
        else:
            if not any(other.tokens for other in self._samples):
                self._metrics.time_to_first_token.labels(*self._labels).observe(when - self._arrival)
            sample.first = when
            observed -= 1
        for _ in range(observed):
            self._gap.observe(gap)
        sample.tokens += count
        sample.last = when

    def searched(self, tokens: int) -> None:
        """A beam search computed so many tokens in a step."""
        if tokens:
            self._spend(tokens)

    def drafted(self, tokens: int, accepted: int) -> None:
        """So many tokens were drafted in a step, and so many of these output."""
        self.draft_tokens += tokens
        self.accepted_draft_tokens += accepted

    def usage(self) -> types_pb2.Usage:
        """The tokens that it consumed so far."""
        return types_pb2.Usage(
            prompt_tokens=self.prompt_tokens,
            cached_prompt_tokens=self.cached_tokens,
            completion_tokens=sum(sample.tokens for sample in self._samples),
            draft_tokens=self.draft_tokens,
            accepted_draft_tokens=self.accepted_draft_tokens,
        )

    def moments(self) -> Moments:
        """The times of its events so far; it ends now."""
        produced = [sample for sample in self._samples if sample.tokens]
        return Moments(
            arrival=self._arrival,
            started=self._started,
            first=min((sample.first for sample in produced), default=None),
            last=max((sample.last for sample in produced), default=None),
            end=time.monotonic(),
        )

    def complete(self) -> types_pb2.Timings:
        """Closes the record of a request that was answered, and gives its times."""
        moments = self.moments()
        end = moments.end
        first = end if moments.first is None else moments.first
        last = end if moments.last is None else moments.last
        started = first if moments.started is None else moments.started
        produced = [sample for sample in self._samples if sample.tokens]
        timings = types_pb2.Timings(
            queue_seconds=started - self._arrival,
            prefill_seconds=first - started,
            decode_seconds=last - first,
            time_to_first_token_seconds=first - self._arrival,
            total_seconds=end - self._arrival,
            preemptions=sum(sample.preemptions for sample in self._samples),
        )
        metrics, labels = self._metrics, self._labels
        metrics.queue_time.labels(*labels).observe(timings.queue_seconds)
        metrics.prefill_time.labels(*labels).observe(timings.prefill_seconds)
        metrics.decode_time.labels(*labels).observe(timings.decode_seconds)
        metrics.e2e_latency.labels(*labels).observe(timings.total_seconds)
        if metrics.request_prompt_tokens is not None and metrics.request_generation_tokens is not None:
            metrics.request_prompt_tokens.labels(*labels).observe(self.prompt_tokens)
            for sample in self._samples:
                metrics.request_generation_tokens.labels(*labels).observe(sample.tokens)
        for sample in produced:
            if sample.tokens > 1:
                mean = (sample.last - sample.first) / (sample.tokens - 1)
                metrics.time_per_output_token.labels(*labels).observe(mean)
        return timings
