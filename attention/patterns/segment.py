"""A query's own segment and the one before it."""

from __future__ import annotations

from typing import ClassVar

import torch

from attention.patterns.declared import SEGMENT
from attention.patterns.options import NumberedPattern, ranges


class Segment(NumberedPattern):
    """The tokens that segment-level recurrence reaches, and sinks.

    The text is cut into segments; query ``i`` sees key ``j`` if ``j`` lies in its own segment or in the one
    before. A layer of Transformer-XL sees the same (Dai et al., 2019, section 3.2), here with the model's
    own positions instead of relative ones, and with the first tokens as sinks, without which models that
    were not trained so collapse.

    Lossy; pages before the previous segment are freed, except the sinks'.

    Args:
        segment: tokens of a segment; at least 1.
        sinks: first tokens that every query sees.
        dense_layers: indices of layers that see every earlier token instead; with any, no page is freed.
    """

    name = "segment"
    numbers: ClassVar = SEGMENT.numbers

    def __init__(self, segment: int, sinks: int, dense_layers: tuple[int, ...] = ()) -> None:
        self.dense_layers = dense_layers
        self.segment = segment
        self.sinks = sinks

    def visible(self, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
        """See ``Pattern.visible``."""
        near = key_positions // self.segment >= query_positions // self.segment - 1
        return (near | (key_positions < self.sinks)) & (key_positions <= query_positions)

    def spans(self, positions: torch.Tensor) -> torch.Tensor:
        """See ``Pattern.spans``; the sinks, then the two segments."""
        near = (positions // self.segment - 1).clamp(min=0) * self.segment
        return ranges((torch.zeros_like(near), near.clamp(max=self.sinks)), (near, positions + 1))

    def expired(self, seq_len: int, page_size: int) -> range:
        """See ``Pattern.expired``; the pages between the sinks' and the previous segment's."""
        first = -(-self.sinks // page_size)
        return range(first, max(first, (seq_len // self.segment - 1) * self.segment // page_size))
