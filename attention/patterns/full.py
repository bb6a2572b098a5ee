"""Every query sees every earlier token and itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch

from attention.patterns.base import Pattern
from attention.patterns.declared import read_none


class Full(Pattern):
    """Plain causal attention; exact, keeps everything."""

    name = "full"
    dense = True

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> Self:
        """See ``Pattern.from_options``; there are no options."""
        read_none(options)
        return cls()

    @property
    def options(self) -> dict[str, str]:
        """None."""
        return {}

    def visible(self, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
        """See ``Pattern.visible``."""
        return key_positions <= query_positions

    def spans(self, positions: torch.Tensor) -> torch.Tensor:
        """See ``Pattern.spans``."""
        return torch.stack([torch.zeros_like(positions), positions + 1], dim=-1)[:, None]

    def expired(self, seq_len: int, page_size: int) -> range:
        """See ``Pattern.expired``; nothing ever expires."""
        return range(0)
