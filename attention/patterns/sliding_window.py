"""The first tokens and the most recent ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch

from attention.patterns.base import Pattern

_DEFAULTS = {"window": 1020, "sinks": 4}
_LEAST = {"window": 1, "sinks": 0}


class SlidingWindow(Pattern):
    """A window over the last tokens, and attention sinks: the first tokens, which stay visible.

    Query ``i`` sees key ``j`` if ``j < sinks`` or ``i - j < window``. Models that were trained with full
    attention put much of their attention on the first tokens, whatever these say; without them a window
    collapses (Xiao et al.: Efficient Streaming Language Models with Attention Sinks, 2024, sections 3.1 and
    3.2). Keys keep the positions that they were computed at.

    Lossy: what has left the window is gone for good, and its pages are freed.

    Args:
        window: recent tokens that a query sees, itself included; at least 1.
        sinks: first tokens that every query sees.
    """

    name = "sliding_window"

    def __init__(self, window: int = _DEFAULTS["window"], sinks: int = _DEFAULTS["sinks"]) -> None:
        self.window = window
        self.sinks = sinks

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> Self:
        """See ``Pattern.from_options``; the options are ``window`` and ``sinks``, whole numbers."""
        values = dict(_DEFAULTS)
        for name, text in options.items():
            if name not in values:
                raise ValueError(f"sliding_window has no option {name!r}; its options are window and sinks")
            if not text.isdecimal() or int(text) < _LEAST[name]:
                least = _LEAST[name]
                raise ValueError(
                    f"sliding_window's {name} is {text!r}; it must be a whole number of at least {least}"
                )
            values[name] = int(text)
        return cls(**values)

    @property
    def options(self) -> dict[str, str]:
        """``window`` and ``sinks``."""
        return {"window": str(self.window), "sinks": str(self.sinks)}

    def visible(self, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
        """See ``Pattern.visible``."""
        near = (key_positions < self.sinks) | (query_positions - key_positions < self.window)
        return near & (key_positions <= query_positions)

    def expired(self, seq_len: int, page_size: int) -> range:
        """See ``Pattern.expired``; the pages between the sinks' and the window's."""
        first = -(-self.sinks // page_size)
        return range(first, max(first, (seq_len - self.window + 1) // page_size))
