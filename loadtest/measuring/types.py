"""The parts of a measurement of speed: cells in interleaved rounds. Nothing here measures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar


class CannotMeasureError(RuntimeError):
    """A target can't be measured under a load, although no request failed; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and how far it can be trusted, at the confidence of the run that it belongs to.

    Attributes:
        value: the estimate.
        low: lower end of the interval; NaN where there are too few samples to claim one.
        high: upper end; NaN likewise.
        count: independent samples that it comes from.
    """

    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    count: int = 0

    @property
    def claimed(self) -> bool:
        """There is an interval, not only an estimate."""
        return not (math.isnan(self.low) or math.isnan(self.high))

    def excludes(self, value: float) -> bool:
        """The interval is claimed, and ``value`` lies outside it."""
        return self.claimed and not self.low <= value <= self.high

    def scaled(self, factor: float) -> Interval:
        """In another unit, whose figures are these times a factor above 0."""
        return Interval(self.value * factor, self.low * factor, self.high * factor, self.count)


@dataclass(frozen=True, slots=True)
class Weather:
    """Other use of the processors while a cell was measured, as shares of all of this process's cores.

    Attributes:
        stolen: time that the hypervisor gave to others.
        foreign: time of processes that have no part in the measurement.
        throttled: time that a quota took away.
    """

    stolen: float = 0.0
    foreign: float = 0.0
    throttled: float = 0.0


@dataclass(frozen=True, slots=True)
class Measurement:
    """One cell, measured once.

    Attributes:
        deployment: its name.
        load: its label.
        round: from 0; each visits every deployment twice, there and back, so that a linear drift cancels.
        visit: 0 there, 1 back.
        attempt: 0, or how often it was repeated since the machine had other work.
        began: seconds since the run began.
        seconds: that it took.
        figures: by name, in seconds, tokens per second, bytes or counts; see ``docs/measuring.md``.
        weather: of that time.
        disturbed: why this one does not count, a sentence; empty if it does.
        error: why there are no figures; empty if there are.
        set_aside: why its whole round does not count and was to be measured again, a sentence; empty if not.
    """

    deployment: str
    load: str
    round: int
    visit: int
    attempt: int
    began: float
    seconds: float
    figures: Mapping[str, float] = field(default_factory=dict)
    weather: Weather = field(default_factory=Weather)
    disturbed: str = ""
    error: str = ""
    set_aside: str = ""


class HasLabel(Protocol):
    """A load, as far as rounds know it."""

    @property
    def label(self) -> str:
        """Its name in tables, unique in a run."""
        ...


LoadT = TypeVar("LoadT", bound=HasLabel, contravariant=True)


class Target(Protocol[LoadT]):
    """A deployment that runs and can be measured."""

    @property
    def pids(self) -> tuple[int, ...] | None:
        """Its processes on this machine (the caller adds their children), whose time is not foreign.

        ``None`` if they can't be told from others or are on another machine: what disturbs it is not known.
        """
        ...

    def measure(self, load: LoadT, seed: int) -> Mapping[str, float]:
        """Puts the load on it once; figures by name.

        Args:
            load: what to send.
            seed: of what is drawn; the same for all deployments of a round's visit.

        Raises:
            longspan.LongspanError: a request failed.
            CannotMeasureError: the measurement does not represent the load.
        """
        ...


@dataclass(frozen=True, slots=True)
class Load:
    """The load of a cell of a comparison: so many users with prompts of one length.

    Attributes:
        context: tokens of prompt and output together.
        output_tokens: of each request.
        concurrency: users in a closed loop; 0 where ``rate`` is given.
        rate: sessions per second of an open loop with Poisson arrivals; 0 for a closed loop.
        requests: of a cell, all users together.
        cached: prompts are in the server's prefix cache but for their last page: the cell only decodes.
            Else prompts are new, and the cell has its prefill too.
    """

    context: int
    output_tokens: int
    concurrency: int = 1
    rate: float = 0.0
    requests: int = 1
    cached: bool = False

    @property
    def users(self) -> int:
        """Requests at once, at most."""
        return self.requests if self.rate else self.concurrency

    @property
    def label(self) -> str:
        """Its name in tables."""
        users = f"{self.rate:g}/s" if self.rate else f"{self.concurrency} user{'s' * (self.concurrency > 1)}"
        return f"{length_label(self.context)}, {users}, {'cached' if self.cached else 'new'} prompts"


def length_label(tokens: int) -> str:
    """A context length in a few letters: 4k, 1000."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)
