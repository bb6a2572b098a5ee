"""Runs of tokens that must not come twice; imports no torch."""

from __future__ import annotations

from array import array

import numpy as np

TYPE = "q"
"""Of the arrays of tokens."""


def repeating(tokens: array[int], size: int) -> list[int]:
    """Tokens, in ascending order, that would end a run of ``size`` tokens that is among ``tokens`` already.

    It is asked for each token of an output, in the engine's process between steps: so all places are compared
    at once, a token of the run at a time, which takes 131,000 equal tokens and a run of 64 a few ms.

    Args:
        tokens: of type ``TYPE``.
        size: 0 for none.
    """
    count = len(tokens) - size + 1
    if not size or count < 1:
        return []
    known = np.frombuffer(tokens, dtype=np.int64)
    alike = np.ones(count, dtype=bool)
    # From the last token of the run backward: few places have that, and mostly none the one before as well.
    for place in range(size - 2, -1, -1):
        alike &= known[place : place + count] == known[count + place]
        if not alike.any():
            return []
    found: list[int] = np.unique(known[size - 1 :][alike]).tolist()
    return found
