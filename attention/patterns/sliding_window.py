"""The first tokens and the most recent ones."""

from __future__ import annotations

from typing import ClassVar

import torch

from attention.patterns.declared import SLIDING_WINDOW
from attention.patterns.options import NumberedPattern, ranges


class SlidingWindow(NumberedPattern):
    """A window over the last tokens, and attention sinks: the first tokens, which stay visible.

    Query ``i`` sees key ``j`` if ``j < sinks`` or ``i - j < window``. Models that were trained with full
    attention put much of their attention on the first tokens, whatever their content; without them a window
    collapses (Xiao et al.: Efficient Streaming Language Models with Attention Sinks, 2024, sections 3.1 and
    3.2).

    With ``positions="original"`` every key has its true distance from the query, which for the sinks grows
    with the context. With ``positions="cache"`` the sinks have distances as if the cache held only sinks and
    window, one after the other (section 3.2): always less than ``sinks + window``, for any context.

    Lossy: no later query sees tokens that have left the window, and their pages are freed.

    Args:
        window: recent tokens that a query sees, itself included; at least 1.
        sinks: first tokens that every query sees.
        dense_layers: indices of layers that see every earlier token instead, at its true distance; with
            any, no page is freed.
        positions: ``original`` or ``cache``.
    """

    name = "sliding_window"
    numbers: ClassVar = SLIDING_WINDOW.numbers
    words: ClassVar = SLIDING_WINDOW.words

    def __init__(
        self, window: int, sinks: int, dense_layers: tuple[int, ...] = (), positions: str = "original"
    ) -> None:
        self.dense_layers = dense_layers
        self.window = window
        self.sinks = sinks
        self.positions = positions
        if positions == "cache":
            self.rerotated = sinks
            self.reach = None if dense_layers else sinks + window

    def visible(self, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
        """See ``Pattern.visible``."""
        near = (key_positions < self.sinks) | (query_positions - key_positions < self.window)
        return near & (key_positions <= query_positions)

    def spans(self, positions: torch.Tensor) -> torch.Tensor:
        """See ``Pattern.spans``; the sinks, then the window."""
        near = (positions - self.window + 1).clamp(min=0)
        return ranges((torch.zeros_like(near), near.clamp(max=self.sinks)), (near, positions + 1))

    def expired(self, seq_len: int, page_size: int) -> range:
        """See ``Pattern.expired``; the pages between the sinks' and the window's."""
        first = -(-self.sinks // page_size)
        return range(first, max(first, (seq_len - self.window + 1) // page_size))

    def rerotation(self, positions: torch.Tensor) -> torch.Tensor:
        """See ``Pattern.rerotation``; by the distance between the sinks and the window."""
        return (positions - (self.sinks + self.window - 1)).clamp(min=0)
