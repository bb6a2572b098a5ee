"""Patterns whose options are whole numbers: reading them and giving them back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from attention.patterns.base import Pattern


class NumberedPattern(Pattern):
    """A pattern made from whole numbers, each with a default and a least value.

    A subclass takes them as keyword arguments and keeps them as attributes of the same names.

    Attributes:
        numbers: name to default and least value.
    """

    numbers: ClassVar[Mapping[str, tuple[int, int]]]

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> Self:
        """See ``Pattern.from_options``; the options are the names in ``numbers``."""
        values: dict[str, Any] = {name: default for name, (default, _) in cls.numbers.items()}
        for name, text in options.items():
            if name not in cls.numbers:
                known = ", ".join(cls.numbers)
                raise ValueError(f"{cls.name} has no option {name!r}; its options are {known}")
            least = cls.numbers[name][1]
            if not text.isdecimal() or int(text) < least:
                raise ValueError(
                    f"{cls.name}'s {name} is {text!r}; it must be a whole number of at least {least}"
                )
            values[name] = int(text)
        return cls(**values)

    @property
    def options(self) -> dict[str, str]:
        """See ``Pattern.options``."""
        return {name: str(getattr(self, name)) for name in self.numbers}
