"""The parts of a measurement of cost against growing work."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from loadtest.deployment import FULL
from loadtest.measuring.analysis import own, ratio
from loadtest.measuring.statistics import LEAST
from loadtest.measuring.types import Interval, Measurement


class Point(NamedTuple):
    """An amount of work.

    Attributes:
        context: tokens in the cache, of each stream.
        streams: sequences that run at once.
    """

    context: int
    streams: int

    @property
    def label(self) -> str:
        """Its name among measurements."""
        return f"{self.context} tokens x {self.streams}"


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of a measurement.

    Attributes:
        contexts: ascending; measured with the fewest streams.
        streams: ascending; measured at the shortest context.
        steps: timed in each visit to a point, of which a round has two.
        rounds: of each variant, paired with full attention, at each point: at most, since a point whose
            interval is narrow needs no more.
        backends: with their options, like ``sliding_window window=512``; empty for all that there are.
        budget: seconds for all rounds, of which each variant has an equal part.
        arguments: of ``longspan serve``, for all.
    """

    contexts: tuple[int, ...]
    streams: tuple[int, ...]
    steps: int
    rounds: int
    backends: tuple[str, ...]
    budget: float
    arguments: tuple[str, ...]

    @property
    def patience(self) -> float:
        """Seconds that one visit, or opening an engine, may take; more than that is a failure."""
        return max(60.0, self.budget / 5)

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
    """The model and the variants to measure.

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


@dataclass(slots=True)
class Growth:
    """A measurement, complete or under way.

    Attributes:
        created: UTC, ISO 8601.
        machine: see ``loadtest.document.machine``.
        plan: what was asked for.
        survey: what there was.
        measurements: in the order in which they were made; figures are ``tpot``: seconds from a token of a
            stream to its next, ``pages_read`` by a step of all streams and layers, ``pages_held`` by all.
        failed: by variant and point, why a point of it failed.
        busy: why this machine is too busy to tell variants apart; empty if it is not.
    """

    created: str
    machine: dict[str, Any]
    plan: Plan
    survey: Survey
    measurements: list[Measurement] = field(default_factory=list)
    failed: dict[str, dict[str, str]] = field(default_factory=dict)
    busy: str = ""

    @property
    def points(self) -> tuple[Point, ...]:
        """Points of the plan that the model can serve."""
        return tuple(point for point in self.plan.points if point.context in self.survey.contexts)

    def seconds(self, variant: str, point: Point) -> Interval:
        """Seconds from a token of a stream to its next; NaN where there is no figure."""
        return own(self.measurements, variant, point.label, "tpot")

    def ratio(self, variant: str, point: Point) -> Interval:
        """How many times faster than full attention, paired by round; NaN where one of them has no figure."""
        return ratio(self.measurements, variant, FULL.name, point.label, "tpot")

    def reasons(self, variant: Variant) -> list[str]:
        """Why some or all of its points are missing, a sentence each."""
        if variant.refusal is not None:
            return [variant.refusal]
        missing: dict[str, list[str]] = {}
        late = "the budget ended before it was measured; give a longer --budget, or less to do"
        measured = {
            each.load for each in self.measurements if each.deployment == variant.name and each.figures
        }
        for point in self.points:
            reason = self.failed.get(variant.name, {}).get(point.label)
            if reason is not None or point.label not in measured:
                missing.setdefault(reason or late, []).append(point.label)
        return [f"{', '.join(where)}: {reason}" for reason, where in missing.items()]

    def short(self, variant: Variant) -> str:
        """Which points have too few rounds for an interval, with how many; empty if none has."""
        least = min(LEAST, self.plan.rounds)
        failed = self.failed.get(variant.name, {})
        counts = {point.label: self.seconds(variant.name, point).count for point in self.points}
        found = [
            f"{label} ({count})"
            for label, count in counts.items()
            if 0 < count < least and label not in failed
        ]
        told = f"{', '.join(found)}: fewer than {least} undisturbed rounds; give a longer --budget"
        return told if found else ""

    @property
    def complete(self) -> bool:
        """Every variant that ought to work has all its points."""
        return not any(self.reasons(each) for each in self.survey.variants if each.refusal is None)
