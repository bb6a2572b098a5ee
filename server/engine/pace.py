"""How many prompt tokens a step takes, so that it lasts about as long as it should."""

from __future__ import annotations

LEAST = 32
"""Tokens: with fewer, reading the weights costs more than computing with them."""

FIRST = 128
"""Tokens of the first step, before any duration is known."""

MULTIPLE = 16
"""Rows of a kernel's tile."""

_ENOUGH = 0.75  # of what a step might take: a smaller one says nothing of the pace


class Pace:
    """The prompt tokens of the next step, from the durations of the last ones.

    A new request waits for the step that is under way, and streams that decode wait for every step. Later
    chunks of a prompt cost more per token than earlier ones, since they see more; the one before tells best.

    Args:
        seconds: that the prompt tokens of a step should take; ``None`` for as many tokens as there are.
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._tokens = FIRST
        self._decode = 0.0

    @property
    def tokens(self) -> int | None:
        """The prompt tokens of the next step; ``None`` for any number."""
        return None if self._seconds is None else self._tokens

    def observe(self, tokens: int, decodes: int, seconds: float) -> None:
        """Takes the duration of a step.

        Args:
            tokens: computed for sequences that lack more than one.
            decodes: sequences that decoded in the same step.
            seconds: its duration.
        """
        if self._seconds is None:
            return
        if not tokens:
            self._decode = seconds / max(decodes, 1)
            return
        if tokens < _ENOUGH * self._tokens:
            return
        own = max(seconds - decodes * self._decode, seconds / 2, 1e-6)
        # A step that was held up once says little of the next one.
        wanted = min(2 * self._tokens, max(self._tokens / 2, tokens * self._seconds / own))
        self._tokens = max(LEAST, int(wanted) // MULTIPLE * MULTIPLE)
