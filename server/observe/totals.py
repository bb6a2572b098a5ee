"""Totals of the engine, computed when they are scraped, so that a step need not add to each of them."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from server.messages import Stats

# Numbers of ``Stats`` that count since the engine started, and the metric of each.
_OF_ENGINE = {
    "preemptions": ("preemptions", "Sequences that gave up their pages."),
    "prefix_queries": ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
    "prefix_hits": ("prefix_cache_hits", "Prompt tokens found in the prefix cache."),
    "draft_tokens": ("draft_tokens", "Tokens drafted for steps to verify (--speculate)."),
    "accepted_draft_tokens": ("accepted_draft_tokens", "Drafted tokens that were right, and were output."),
    "pages_read": (
        "attention_pages_read",
        "Pages of the KV cache that attention read, over engine steps, layers and sequences.",
    ),
    "pages_skipped": ("attention_pages_skipped", "Pages that full attention would have read besides."),
}


class EngineTotals(Collector):
    """Counters of all engines that a server has had, one after another."""

    def __init__(self) -> None:
        self._model: str | None = None
        self._before = dict.fromkeys(_OF_ENGINE, 0)
        self._last = Stats()
        self._bytes = 0
        self._flops = 0

    def step(self, stats: Stats) -> None:
        """Takes an engine's load after a step."""
        self._last = stats
        self._bytes += stats.bytes_moved
        self._flops += stats.flops

    def begin(self, model: str) -> None:
        """From now on another engine counts, from 0."""
        before = {name: value + getattr(self._last, name) for name, value in self._before.items()}
        self._model, self._before, self._last = model, before, Stats()

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Called for a scrape."""
        before, last = self._before, self._last
        for field, (name, words) in _OF_ENGINE.items():
            yield self._counter(name, words, before[field] + getattr(last, field))
        yield self._counter(
            "engine_bytes",
            "Bytes that engine steps had to move to and from the device's memory: weights, keys, values.",
            self._bytes,
        )
        yield self._counter(
            "engine_flops",
            "Operations of engine steps, two to a multiply-add, in whatever dtype.",
            self._flops,
        )

    def _counter(self, name: str, words: str, value: int) -> CounterMetricFamily:
        family = CounterMetricFamily(f"longspan_{name}", words, labels=["model_name"])
        if self._model is not None:
            family.add_metric([self._model], value)
        return family
