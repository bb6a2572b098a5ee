"""What became of one model that was tried."""

from __future__ import annotations

import enum
from dataclasses import dataclass

MISSING = "is not installed"
"""Ends the detail of what was not tried for want of a package."""


class Verdict(enum.StrEnum):
    """The word in the table."""

    EXACT = "exact"
    REFUSED = "refused"
    WRONG = "WRONG"
    CRASHED = "CRASHED"
    NOT_TRIED = "not tried"


@dataclass(frozen=True)
class Outcome:
    """One row's result.

    Attributes:
        verdict: the word.
        detail: how far it was compared, the refusal, the difference, or why it was not tried.
    """

    verdict: Verdict
    detail: str = ""
