"""Runs of tokens that must not come twice; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence


def repeating(tokens: Sequence[int], size: int) -> list[int]:
    """Tokens that would end a run of ``size`` tokens that is among ``tokens`` already; none for size 0."""
    if not size or len(tokens) < size:
        return []
    newest = tokens[len(tokens) - size + 1 :]
    starts = range(len(tokens) - size + 1)
    return [tokens[i + size - 1] for i in starts if tokens[i : i + size - 1] == newest]
