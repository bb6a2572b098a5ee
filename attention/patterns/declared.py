"""The options of Longspan's own patterns: names, defaults, and allowed values.

Imports no torch, so that a server can refuse options before it has an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Options(NamedTuple):
    """The options of a pattern: whole numbers, words from a list, and the indices of dense layers.

    Attributes:
        pattern: its name.
        numbers: name to default and least value.
        words: name to its allowed values, the default first.
        dense_layers: the default of the option ``dense_layers``.
        check: of all values; raises ValueError with the sentence.
    """

    pattern: str
    numbers: Mapping[str, tuple[int, int]]
    words: Mapping[str, tuple[str, ...]] = {}
    dense_layers: tuple[int, ...] = ()
    check: Callable[[Mapping[str, Any]], None] | None = None

    def read(self, options: Mapping[str, str]) -> dict[str, Any]:
        """The value of every option, from text or by default.

        Raises:
            ValueError: an option is unknown or cannot be used; the message says what is allowed.
        """
        values: dict[str, Any] = {name: default for name, (default, _) in self.numbers.items()}
        values |= {name: allowed[0] for name, allowed in self.words.items()}
        values["dense_layers"] = self.dense_layers
        for name, text in options.items():
            if name not in values:
                raise ValueError(
                    f"{self.pattern} has no option {name!r}; its options are {', '.join(values)}"
                )
            values[name] = self._value(name, text)
        if self.check is not None:
            self.check(values)
        return values

    def _value(self, name: str, text: str) -> Any:
        if name == "dense_layers":
            return _layers(self.pattern, text)
        if name in self.words:
            if text not in self.words[name]:
                raise ValueError(
                    f"{self.pattern}'s {name} is {text!r}; choose {' or '.join(self.words[name])}"
                )
            return text
        least = self.numbers[name][1]
        if not text.isdecimal() or int(text) < least:
            raise ValueError(
                f"{self.pattern}'s {name} is {text!r}; it must be a whole number of at least {least}"
            )
        return int(text)


def _layers(pattern: str, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if not all(part.isdecimal() for part in parts):
        raise ValueError(
            f"{pattern}'s dense_layers is {text!r}; give indices of layers, like dense_layers=0,1, or nothing"
        )
    return tuple(sorted({int(part) for part in parts}))


def read_none(options: Mapping[str, str]) -> dict[str, Any]:
    """The options of full attention, which has none.

    Raises:
        ValueError: some are given.
    """
    if options:
        raise ValueError(f"full attention takes no options; remove {', '.join(sorted(options))}")
    return {}


def check_buckets(values: Mapping[str, Any]) -> None:
    """Refuses numbers of ``buckets`` that LSH cannot have.

    Raises:
        ValueError: it is odd, or too large for the dtype in which a token's buckets are stored.
    """
    buckets = values["buckets"]
    if buckets % 2 or buckets > _MOST_BUCKETS:
        raise ValueError(
            f"lsh's buckets is '{buckets}'; it must be an even number of at most {_MOST_BUCKETS}"
        )


_MOST_BUCKETS = 1 << 15

SLIDING_WINDOW = Options(
    "sliding_window", {"window": (1020, 1), "sinks": (4, 0)}, {"positions": ("original", "cache")}
)
LONGFORMER = Options("longformer", {"window": (512, 1), "global_tokens": (16, 0)})
BIGBIRD = Options(
    "bigbird", {"block": (64, 1), "window_blocks": (3, 1), "random_blocks": (3, 0), "seed": (0, 0)}
)
SEGMENT = Options("segment", {"segment": (512, 1), "sinks": (4, 0)})
LSH = Options(
    "lsh",
    {"hashes": (8, 1), "buckets": (128, 2), "window": (128, 1), "sinks": (4, 0), "seed": (0, 0)},
    check=check_buckets,
)
TOPK = Options(
    "topk",
    {"budget": (512, 1), "sink_pages": (1, 0), "recent_pages": (4, 1)},
    {"prefill": ("dense", "sparse")},
    dense_layers=(0, 1),
)
ORACLE = TOPK._replace(pattern="oracle")

SPARSE = {options.pattern: options for options in (LONGFORMER, BIGBIRD, SEGMENT, LSH, TOPK, ORACLE)}
"""The options of each pattern that the option ``pattern`` of ``sparse`` can name."""


def member(options: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """The sparse pattern that ``options["pattern"]`` names, and the other options, which are its own.

    Raises:
        ValueError: there is no such pattern.
    """
    rest = dict(options)
    name = rest.pop("pattern", None)
    if name is None or name not in SPARSE:
        given = "needs an option pattern" if name is None else f"has no pattern {name!r}"
        raise ValueError(f"sparse attention {given}; choose pattern={' or pattern='.join(SPARSE)}")
    return name, rest


def read_sparse(options: Mapping[str, str]) -> dict[str, Any]:
    """The value of every option of the sparse pattern that ``options["pattern"]`` names.

    Raises:
        ValueError: there is no such pattern, or an option of it cannot be used.
    """
    name, rest = member(options)
    return SPARSE[name].read(rest)
