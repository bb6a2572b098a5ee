"""How prompts share what a step has left for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from server.engine.pace import MULTIPLE, Pace
from server.engine.sequence import Sequence, State

SHORT = 4
"""Steps: a prompt that takes no longer is a short one."""

ALONE = 2
"""Times the usual allowance, for a long prompt that holds up nothing: larger chunks compute faster. Twice as
much again would save 3% of its time, and hold up the next request for twice as long."""

GIVEN_UP = 4
"""The same where the step is given up for the next request, which then does not wait for it. What was
computed of it is computed again, once a second at most."""

GIVEN_UP_TOKENS = 4 * MULTIPLE
"""Tokens of such a step at least. Late in a prompt, what a step costs whatever its tokens is as much as some
ten tokens, so that on a slow machine, where a tile takes all its time, a prompt took half as long again."""

PATIENCE = 4
"""Steps that the most urgent prompt leaves to short ones in a row; after these it has every other step."""


class Step:
    """A step's plan in the making.

    Attributes:
        budget: tokens that it may still take.
        allowance: cost that its prompts may still have, by ``Pace``; unbounded for decodes.
        given_up: it is to be given up when another request comes.
        preempts: sequences may have to give way to others.
        stuck: a sequence would have to give way, but must not.
        refused: waiting sequences for which there is no room.
        closed: the first in the queue is refused, and no other is admitted any more.
        scheduled: tokens of each sequence.
    """

    def __init__(self, budget: int, *, preempts: bool) -> None:
        self.budget = budget
        self.allowance = math.inf
        self.preempts = preempts
        self.stuck = self.closed = self.given_up = False
        self.refused: set[Sequence] = set()
        self.scheduled: dict[Sequence, int] = {}

    def plan(self, sequence: Sequence, tokens: int, cost: float) -> None:
        """Adds tokens of a sequence."""
        self.scheduled[sequence] = self.scheduled.get(sequence, 0) + tokens
        self.budget -= tokens
        self.allowance -= cost

    def add_drafts(self, extend: Callable[[Sequence, int], bool]) -> None:
        """Adds the drafted tokens that decodes want, with what all others have left of tokens and pages.

        Args:
            extend: see ``KVManager.extend``.
        """
        for sequence in sorted(self.scheduled, key=lambda s: s.urgency):
            drafts = min(sequence.wanted_drafts, self.budget) if sequence.remaining == 1 else 0
            while drafts and not extend(sequence, 1 + drafts):
                drafts -= 1
            if drafts:
                self.plan(sequence, drafts, 0.0)

    def drop(self, sequence: Sequence) -> None:
        """Takes a sequence out; its cost is not given to others, which only makes the step shorter."""
        self.budget += self.scheduled.pop(sequence, 0)


class Division:
    """The shares of a step's prompts.

    Where steps are kept short, a step with short prompts is theirs alone: they would wait for what filled it
    up. The most urgent prompt gives way so only ``PATIENCE`` times in a row. In all other steps it gets half,
    so that it always goes on, and the shortest ones the other half; what one half leaves the other takes.
    Prompts of a lower priority get the rest.

    Args:
        prompts: sequences that lack more than one token, at least one.
        pace: what tokens cost.
        step: the plan, decodes included; its allowance is set.
        quiet: no other request has come for a while.
        gives_up: a step can be given up when another request comes.
    """

    def __init__(
        self,
        prompts: list[Sequence],
        pace: Pace,
        step: Step,
        *,
        quiet: bool = False,
        gives_up: bool = False,
    ) -> None:
        self._pace, self._step = pace, step
        first = min(prompts, key=lambda s: s.urgency)
        running = [s for s in prompts if s.state is State.RUNNING]
        self._urgent = [first]
        if first.state is not State.RUNNING and running:
            # There may be no room for the first, and then this one has its share.
            self._urgent.append(min(running, key=lambda s: s.urgency))
        others = [s for s in prompts if s is not first]
        others.sort(key=lambda s: (-s.request.priority, s.to_compute, s.arrival))
        self._equals = [s for s in others if s.request.priority >= first.request.priority]
        self._lower = others[len(self._equals) :]
        self._short: list[Sequence] = []
        if pace.allowance is None:
            step.allowance = step.budget
        else:
            # A tile of tokens for the most urgent, and one for another, however long these take.
            least = 2 * MULTIPLE if self._equals else MULTIPLE
            short, usual = self._is_short(first), pace.allowance
            alone = quiet and pace.known and not others and not step.scheduled
            step.given_up = alone and gives_up and not short
            if step.given_up:
                usual, least = GIVEN_UP * usual, GIVEN_UP_TOKENS
            elif alone:
                usual *= ALONE
            step.allowance = max(usual, *(pace.cost(_begin(s), least) for s in self._urgent))
            if short or all(s.passed_over < PATIENCE for s in self._urgent):
                self._short = [*[first] * short, *filter(self._is_short, self._equals)]

    def shares(self) -> Iterator[tuple[Sequence, float]]:
        """Sequences and the cost that each may have at most, in the order of service.

        The caller plans each before it asks for the next one.
        """
        scheduled = self._step.scheduled
        for sequence in self._short:
            yield sequence, math.inf
        if any(sequence in scheduled for sequence in self._short):
            for sequence in self._urgent:
                sequence.passed_over += sequence not in scheduled
            return
        half = math.ceil(self._step.allowance / 2) if self._equals else math.inf
        for sequence in self._urgent:
            sequence.passed_over = max(0, sequence.passed_over - 1)
            if not any(other in scheduled for other in self._urgent):
                yield sequence, half
        for sequence in (*self._equals, self._urgent[0], *self._lower):
            yield sequence, math.inf

    def _is_short(self, sequence: Sequence) -> bool:
        allowance = self._pace.allowance
        cost = self._pace.cost(_begin(sequence), sequence.to_compute)
        return allowance is not None and cost <= SHORT * allowance


def _begin(sequence: Sequence) -> int:
    """The first token that it has to compute, as far as it is known before it runs."""
    return sequence.total - sequence.to_compute
