"""Patterns made from options: reading them, giving them back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch

from attention.patterns.base import Pattern


class NumberedPattern(Pattern):
    """A pattern made from whole numbers, words to choose from, and the layers that it leaves alone.

    A subclass takes them as keyword arguments and keeps them as attributes of the same names.

    Attributes:
        numbers: name to default and least value.
        words: name to the values it may have, the default first.
        dense_by_default: the default of the option ``dense_layers``.
    """

    numbers: ClassVar[Mapping[str, tuple[int, int]]]
    words: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    dense_by_default: ClassVar[tuple[int, ...]] = ()

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> Self:
        """See ``Pattern.from_options``; the options are the names in ``numbers`` and ``words``."""
        values: dict[str, Any] = {name: default for name, (default, _) in cls.numbers.items()}
        values |= {name: choices[0] for name, choices in cls.words.items()}
        values["dense_layers"] = cls.dense_by_default
        for name, text in options.items():
            if name not in values:
                raise ValueError(f"{cls.name} has no option {name!r}; its options are {', '.join(values)}")
            values[name] = cls._value(name, text)
        return cls(**values)

    @classmethod
    def _value(cls, name: str, text: str) -> Any:
        if name == "dense_layers":
            return _layers(cls.name, text)
        if name in cls.words:
            if text not in cls.words[name]:
                raise ValueError(f"{cls.name}'s {name} is {text!r}; choose {' or '.join(cls.words[name])}")
            return text
        least = cls.numbers[name][1]
        if not text.isdecimal() or int(text) < least:
            raise ValueError(
                f"{cls.name}'s {name} is {text!r}; it must be a whole number of at least {least}"
            )
        return int(text)

    @property
    def options(self) -> dict[str, str]:
        """See ``Pattern.options``."""
        names = [*self.numbers, *self.words]
        dense = ",".join(map(str, self.dense_layers))
        return {**{name: str(getattr(self, name)) for name in names}, "dense_layers": dense}


def ranges(*spans: tuple[Any, Any]) -> torch.Tensor:
    """``[N, K, 2]`` from ``K`` pairs of begins and ends ``[N]``."""
    return torch.stack([torch.stack(span, dim=-1) for span in spans], dim=1)


def _layers(pattern: str, text: str) -> Sequence[int]:
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if not all(part.isdecimal() for part in parts):
        raise ValueError(
            f"{pattern}'s dense_layers is {text!r}; give indices of layers, like dense_layers=0,1, or nothing"
        )
    return tuple(sorted({int(part) for part in parts}))
