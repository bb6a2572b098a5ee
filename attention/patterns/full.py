"""Every query sees every earlier token and itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from attention.patterns.base import Causal
from attention.patterns.declared import read_none


class Full(Causal):
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
