"""Patterns made from options, which they read and return."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch

from attention.patterns.base import Pattern
from attention.patterns.declared import Options


class NumberedPattern(Pattern):
    """A pattern made from whole numbers, words from a list, and the indices of dense layers.

    A subclass takes them as keyword arguments and keeps them as attributes of the same names.

    Attributes:
        numbers: name to default and least value.
        words: name to its allowed values, the default first.
        dense_by_default: the default of the option ``dense_layers``.
    """

    numbers: ClassVar[Mapping[str, tuple[int, int]]]
    words: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    dense_by_default: ClassVar[tuple[int, ...]] = ()

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> Self:
        """See ``Pattern.from_options``; the options are the names in ``numbers`` and ``words``."""
        declared = Options(cls.name, cls.numbers, cls.words, cls.dense_by_default)
        return cls(**declared.read(options))

    @property
    def options(self) -> dict[str, str]:
        """See ``Pattern.options``."""
        names = [*self.numbers, *self.words]
        dense = ",".join(map(str, self.dense_layers))
        return {**{name: str(getattr(self, name)) for name in names}, "dense_layers": dense}


def ranges(*spans: tuple[Any, Any]) -> torch.Tensor:
    """``[N, K, 2]`` from ``K`` pairs of begins and ends ``[N]``."""
    return torch.stack([torch.stack(span, dim=-1) for span in spans], dim=1)
