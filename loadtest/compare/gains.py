"""Figures of speed and memory of one candidate against full attention's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from loadtest.compare.equal import equal_work
from loadtest.compare.types import Comparison, Gain
from loadtest.evaluation.types import Memory
from loadtest.measuring.analysis import own as own_figure
from loadtest.measuring.analysis import ratio
from loadtest.measuring.types import Interval, Load

FIGURES = ("ttft", "tpot", "output_rate")
PER_MEMORY = "memory_rate"
GIBIBYTE = 2**30


def gains(comparison: Comparison, name: str) -> list[Gain]:
    """All figures by load and context; those that were not measured are left out.

    Of full attention its own figures, as gains over itself.
    """
    full = comparison.plan.full
    found = []
    for load in comparison.plan.loads:
        for figure in FIGURES:
            if figure == "ttft" and load.cached:
                continue
            gain = _speed(comparison, full, name, load, figure)
            if gain.own.count or gain.full.count:
                found.append(gain)
    for context in comparison.plan.contexts:
        found += _memory(comparison, full, name, context)
    return found + [each for load in comparison.plan.loads if (each := _per_memory(found, load))]


def is_served(comparison: Comparison, name: str) -> bool:
    """A candidate is for serving; the oracle, which looks at every key, only measures others.

    A reading is none either: it is a client of whatever is served.
    """
    candidate = comparison.plan.candidate(name)
    return candidate.options.get("pattern") != "oracle" and not candidate.is_reading


def operators_load(comparison: Comparison, context: int) -> Load | None:
    """The load that a recommendation at a context is for: the first of that context."""
    return next((load for load in comparison.plan.loads if load.context == context), None)


def deciding_figure(load: Load) -> str:
    """The figure that judges a load: time per token for one user or a given rate, else tokens per second."""
    return "output_rate" if load.concurrency > 1 else "tpot"


def new_prompts(comparison: Comparison, context: int) -> Load | None:
    """The first load of a context whose prompts have their prefill, for time to first token."""
    loads = (load for load in comparison.plan.loads if load.context == context and not load.cached)
    return next(loads, None)


def under_load(gains: Iterable[Gain], load: Load | None, figure: str) -> Gain | None:
    """A figure of speed under a load; ``None`` where there is no such load or figure."""
    return next((one for one in gains if load and (one.load, one.figure) == (load.label, figure)), None)


def of_memory(gains: Iterable[Gain], context: int, figure: str) -> Gain | None:
    """A figure of memory at a context; ``None`` where it was not measured."""
    return next((one for one in gains if (one.context, one.figure) == (context, figure)), None)


def _speed(comparison: Comparison, full: str, name: str, load: Load, figure: str) -> Gain:
    cells, confidence = comparison.speed, comparison.plan.confidence
    return Gain(
        name,
        load.label,
        load.context,
        figure,
        own_figure(cells, full, load.label, figure, confidence),
        own_figure(cells, name, load.label, figure, confidence),
        ratio(cells, name, full, load.label, figure, confidence),
        equal_work(comparison, name, load, figure),
    )


def _memory(comparison: Comparison, full: str, name: str, context: int) -> list[Gain]:
    """Bytes and sequences that fit: counted, not estimated, so that an interval is a point."""
    theirs, ours = _held(comparison, full, context), _held(comparison, name, context)
    if not theirs or not ours:
        return []
    found = []
    if theirs.bytes > 0 and ours.bytes > 0:
        found.append(("bytes", theirs.bytes, ours.bytes, theirs.bytes / ours.bytes))
    if theirs.fits and ours.fits:
        found.append(("fits", theirs.fits, ours.fits, ours.fits / theirs.fits))
    return [
        Gain(name, "", context, figure, _exactly(full_value), _exactly(own_value), _exactly(times))
        for figure, full_value, own_value, times in found
    ]


def _per_memory(gains: Iterable[Gain], load: Load) -> Gain | None:
    """Tokens per second of all users, for each GiB of KV cache that they hold, where users are so many.

    Under a rate it is not known how many sequences are there at once, and one user's speed tells nothing of
    what more of them would have.
    """
    found = list(gains)
    rate, held = under_load(found, load, "output_rate"), of_memory(found, load.context, "bytes")
    if load.concurrency <= 1 or rate is None or held is None:
        return None
    full, own = (one.value * load.concurrency / GIBIBYTE for one in (held.full, held.own))
    return replace(
        rate,
        figure=PER_MEMORY,
        full=rate.full.scaled(1 / full),
        own=rate.own.scaled(1 / own),
        ratio=rate.ratio.scaled(held.ratio.value),
        equal_work=rate.equal_work and held.ratio.value == 1.0,
    )


def _held(comparison: Comparison, name: str, context: int) -> Memory | None:
    rows = [row for row in comparison.memory if (row.deployment, row.length) == (name, context)]
    return next((row for row in reversed(rows) if not row.error), None)


def _exactly(value: float) -> Interval:
    return Interval(value, value, value, 1)
