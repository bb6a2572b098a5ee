"""A window and global tokens."""

from __future__ import annotations

from typing import ClassVar

import torch

from attention.patterns.declared import LONGFORMER
from attention.patterns.options import NumberedPattern
from attention.patterns.sliding_window import SlidingWindow


class Longformer(NumberedPattern):
    """A window, and global tokens at the beginning that every query sees.

    Beltagy et al.: Longformer, 2020, section 3.1, in causal form: only the part of the window before the
    query remains, and a global token sees what any token at its position sees. The original trains
    projections of their own for global tokens; on a model trained without them these tokens are sinks.

    Lossy; pages between the global tokens and the window are freed.

    Args:
        window: recent tokens that a query sees, itself included; at least 1.
        global_tokens: first tokens that every query sees.
        dense_layers: indices of layers that see every earlier token instead; with any, no page is freed.
    """

    name = "longformer"
    numbers: ClassVar = LONGFORMER.numbers

    def __init__(self, window: int, global_tokens: int, dense_layers: tuple[int, ...] = ()) -> None:
        self.dense_layers = dense_layers
        self.window = window
        self.global_tokens = global_tokens
        self._rule = SlidingWindow(window, global_tokens)

    def visible(self, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
        """See ``Pattern.visible``."""
        return self._rule.visible(query_positions, key_positions)

    def spans(self, positions: torch.Tensor) -> torch.Tensor:
        """See ``Pattern.spans``."""
        return self._rule.spans(positions)

    def expired(self, seq_len: int, page_size: int) -> range:
        """See ``Pattern.expired``."""
        return self._rule.expired(seq_len, page_size)
