"""Which cached tokens a query may see."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Self

import torch


class Pattern(ABC):
    """A rule over positions. What a layer adds of its own (its window) comes on top, in the kernels.

    Attributes:
        name: what the pattern is called in settings, logs and metrics.
        dense: every earlier token is visible and no page ever expires, so kernels may skip the rule.
    """

    name: str
    dense: bool = False

    @classmethod
    @abstractmethod
    def from_options(cls, options: Mapping[str, str]) -> Self:
        """The pattern as the operator set it.

        Raises:
            ValueError: an option is unknown or its value cannot be used; the sentence says which to give.
        """

    @property
    @abstractmethod
    def options(self) -> dict[str, str]:
        """The options in force, defaults included, in the form that ``from_options`` takes."""

    @abstractmethod
    def visible(self, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
        """Whether the query at a position may see the key at another: the pattern's definition.

        Args:
            query_positions: integers of any shape.
            key_positions: integers of a shape that broadcasts with it.

        Returns:
            Booleans of the broadcast shape. Never true for a later key, always true for a query's own.
        """

    @abstractmethod
    def expired(self, seq_len: int, page_size: int) -> range:
        """Page indices of a sequence that no query at position ``seq_len`` or later can see.

        Once expired, a page stays expired. The KV manager frees these pages and puts 0 in the page table.
        """
