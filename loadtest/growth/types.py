"""What a measurement of cost against growing work consists of."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any, NamedTuple

FULL = "full"
"""The backend that the others are held against."""


class Point(NamedTuple):
    """An amount of work.

    Attributes:
        context: tokens in the cache, of each stream.
        streams: sequences that run at once.
    """

    context: int
    streams: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure.

    Attributes:
        contexts: ascending; measured with the fewest streams.
        streams: ascending; measured at the shortest context.
        steps: timed at each point.
        backends: with their options, like ``sliding_window window=512``; empty for all that there are.
        seconds: that a backend may take.
        arguments: of ``longspan serve``, for all.
    """

    contexts: tuple[int, ...]
    streams: tuple[int, ...]
    steps: int
    backends: tuple[str, ...]
    seconds: float
    arguments: tuple[str, ...]

    @property
    def points(self) -> tuple[Point, ...]:
        """All, the shortest context and the fewest streams first."""
        longer = [Point(context, self.streams[0]) for context in self.contexts]
        more = [Point(self.contexts[0], streams) for streams in self.streams[1:]]
        return (*longer, *more)


@dataclass(frozen=True, slots=True)
class Variant:
    """A backend with its options on this machine.

    Attributes:
        name: what tables call it.
        options: those in force, defaults included; where it is refused, those that were given.
        kernel: what computes it.
        refusal: why it is not measured, or ``None``.
        arguments: of ``longspan serve``, all that make it.
    """

    name: str
    options: dict[str, str]
    kernel: str
    refusal: str | None
    arguments: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Survey:
    """What there is to measure.

    Attributes:
        model: ``name``, ``architecture``, ``parameters``, ``layers``, ``context_length`` that it is made for,
            ``dtype``, ``weights``, ``kv_dtype`` and ``device``.
        versions: of Longspan and what it runs on.
        folder: where the model lies.
        variants: full attention first.
        notes: what was done to the model or left out, a sentence each.
        contexts: of the plan, as far as the model can be brought to serve them.
    """

    model: dict[str, Any]
    versions: dict[str, str]
    folder: str
    variants: tuple[Variant, ...]
    notes: tuple[str, ...]
    contexts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Measurement:
    """Decode steps of one variant at one point.

    Attributes:
        variant: its name.
        context: see ``Point``.
        streams: see ``Point``.
        seconds: of each step; every stream gets one token in it.
        pages_read: by the first step, summed over layers and streams.
        pages_held: by all streams after it.
    """

    variant: str
    context: int
    streams: int
    seconds: list[float]
    pages_read: int
    pages_held: int

    @property
    def median(self) -> float:
        """Seconds from one token of a stream to its next."""
        return statistics.median(self.seconds)


@dataclass(slots=True)
class Growth:
    """A whole measurement, or one in the making.

    Attributes:
        created: UTC, ISO 8601.
        machine: see ``loadtest.document.machine``.
        plan: what was asked for.
        survey: what there was.
        measurements: in the order in which they were made.
        failures: by variant, why points of it are missing.
    """

    created: str
    machine: dict[str, Any]
    plan: Plan
    survey: Survey
    measurements: list[Measurement] = field(default_factory=list)
    failures: dict[str, list[str]] = field(default_factory=dict)

    @property
    def points(self) -> tuple[Point, ...]:
        """Those of the plan that the model can serve."""
        return tuple(point for point in self.plan.points if point.context in self.survey.contexts)

    def at(self, variant: str, point: Point) -> Measurement | None:
        """What was measured there, if anything."""
        return next(
            (
                found
                for found in self.measurements
                if (found.variant, found.context, found.streams) == (variant, *point)
            ),
            None,
        )

    def reasons(self, variant: Variant) -> list[str]:
        """Why some or all of its points are missing, a sentence each."""
        refusal = [] if variant.refusal is None else [variant.refusal]
        return [*refusal, *self.failures.get(variant.name, [])]
