"""The ranges that the query rows of one step see by rules over positions."""

from __future__ import annotations

import numpy as np

from attention.patterns.base import ContentPattern, Pattern
from attention.patterns.table import selects_at, spans_at
from attention.step import Array, StepBatch


class Visible:
    """The ranges of a step's rows, computed on the host once per rule: layers and page counts share them.

    Arrays, since for so few numbers calling torch costs more than the computation.

    Args:
        host: the step.

    Attributes:
        host: the same.
    """

    def __init__(self, host: StepBatch) -> None:
        self.host = host
        self._spans: dict[tuple[Pattern, int | None], Array] = {}
        self._selecting: dict[ContentPattern, Array] = {}

    def advance(self) -> None:
        """Makes a decode step the same sequences' next one, in place."""
        self.host.advance()
        self._spans.clear()
        self._selecting.clear()

    def spans(self, pattern: Pattern, window: int | None) -> Array:
        """Each query row's ranges, int64 ``[T, K, 2]``: ``Pattern.spans`` within a layer's own window."""
        spans = self._spans.get((pattern, window))
        if spans is None:
            spans = spans_at(pattern, self.host.positions)
            if window is not None:
                spans = np.maximum(spans, (self.host.positions - window + 1)[:, None, None])
            self._spans[pattern, window] = spans
        return spans

    def selecting(self, pattern: ContentPattern) -> Array:
        """The query rows that see only a selection, int64 ``[N]``, ascending; others see all before them."""
        rows = self._selecting.get(pattern)
        if rows is None:
            found = selects_at(pattern, self.host.positions, self.host.row_prompt_lens)
            rows = self._selecting[pattern] = np.flatnonzero(found)
        return rows
