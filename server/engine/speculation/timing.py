"""Whether drafting pays: what a drafted token costs, and what a token is worth, from steps' durations."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import NamedTuple

log = logging.getLogger("longspan.engine")

FIRST = 4
"""Steps without drafts before the first one with."""

AGAIN = 32
"""Steps with drafts after which one goes without, and at first the other way round: no figure may get old."""

SELDOM = 512
"""The most steps without drafts: each trial that does not pay doubles the number until the next, for it costs
every sequence a row."""

TRIAL = 0.5
"""The probability that is asked of a drafted token while its cost is not known."""

GAIN = 1.1
"""Times its cost that a drafted token must be worth, since both are estimates."""

_NEVER = 2.0

_GROWTH = 1.05
"""How much longer a step without drafts may take than the one before. One among steps with drafts has a batch
that is built anew, and takes half as long again as one among its like, whose place drafting takes."""

_MEMORY = 0.5
"""Weight of a drafted token's cost once that of another step is known."""


class Load(NamedTuple):
    """The load of a step that decodes.

    Attributes:
        sequences: their number.
        length: of all of them together, to the power of two above it.
    """

    sequences: int
    length: int


@dataclass(slots=True)
class _Figures:
    """Measurements of steps of one load.

    Attributes:
        plain: seconds of a step without drafts.
        drafted: seconds that a drafted token adds to one; ``None`` while unknown.
        plain_steps: steps without drafts so far.
        without: steps without drafts since the last one with.
        with_drafts: steps with drafts since the last one without.
        told: that drafting does not pay has been logged.
    """

    plain: float = math.inf
    drafted: float | None = None
    plain_steps: int = 0
    without: int = 0
    with_drafts: int = 0
    told: bool = False


class Timing:
    """The durations of steps with and without drafts, by their load."""

    def __init__(self) -> None:
        self._figures: dict[Load, _Figures] = {}
        self._pauses: dict[int, int] = {}  # by the number of sequences, which decides whether drafting pays

    def known(self, load: Load) -> bool:
        """Whether the cost of a drafted token is known; else a step with one for each sequence tells it."""
        figures = self._figures.get(load)
        return figures is not None and figures.drafted is not None

    def least(self, load: Load) -> float:
        """The probability of being right from which a drafted token is worth its cost.

        Above 1 no token is drafted: each costs more, or the next step is to be measured without.
        """
        figures = self._figures.setdefault(load, _Figures())
        if figures.plain_steps < FIRST or figures.with_drafts >= AGAIN:
            return _NEVER
        if figures.drafted is None:
            return TRIAL
        return GAIN * figures.drafted * load.sequences / figures.plain

    def observe(self, load: Load, seconds: float, drafts: int) -> None:
        """Takes the duration of a step, all drafting for it included.

        Args:
            load: of the step, which computed no prompt.
            seconds: its duration.
            drafts: tokens that were drafted.
        """
        figures = self._figures.setdefault(load, _Figures())
        if not drafts:
            figures.plain = min(seconds, _GROWTH * figures.plain)
            figures.plain_steps += 1
            figures.with_drafts = 0
            figures.without += 1
            pause = self._pauses.get(load.sequences, AGAIN)
            if figures.without >= pause and figures.drafted is not None:
                figures.drafted, self._pauses[load.sequences] = None, min(2 * pause, SELDOM)
        else:
            now = max(0.0, seconds - figures.plain) / drafts
            before = now if figures.drafted is None else figures.drafted
            figures.drafted = _MEMORY * before + (1 - _MEMORY) * now
            figures.without = 0
            figures.with_drafts += 1
            if GAIN * figures.drafted * load.sequences < figures.plain:
                self._pauses[load.sequences] = AGAIN
            elif not figures.told:
                figures.told = True
                self._tell(load, figures.plain, figures.drafted)

    @staticmethod
    def _tell(load: Load, plain: float, drafted: float) -> None:
        log.info(
            "drafting does not pay for %d sequences of up to %d tokens in all: a drafted token takes "
            "%.1f ms, and a step without drafts %.1f ms for each of its tokens",
            load.sequences,
            load.length,
            1000 * drafted,
            1000 * plain / load.sequences,
        )
