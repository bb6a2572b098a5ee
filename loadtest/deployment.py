"""Servers to be measured, one attention variant each, and readings, which need none of their own."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from longspan.reading import METHODS, ReadOptions


@dataclass(frozen=True, slots=True)
class Deployment:
    """A server to be measured, or a reading through full attention's server.

    Attributes:
        name: what tables call it.
        attention: ``--attention``; of a reading its ``--method`` of ``longspan read``.
        options: ``--attention-option``, by key; of a reading options of ``longspan read``.
        others: further arguments of ``longspan serve``.
    """

    name: str
    attention: str = "full"
    options: Mapping[str, str] = field(default_factory=dict, hash=False)
    others: tuple[str, ...] = ()

    @property
    def arguments(self) -> list[str]:
        """All arguments of ``longspan serve`` that make it."""
        options = [("--attention-option", f"{key}={value}") for key, value in self.options.items()]
        return ["--attention", self.attention, *(part for option in options for part in option), *self.others]

    @property
    def is_reading(self) -> bool:
        """It reads a document by many short requests, instead of a prompt that holds all of it."""
        return self.attention in METHODS

    def read_options(self) -> ReadOptions:
        """How a reading reads. Nothing is cited, which takes requests and changes no answer.

        Raises:
            ValueError: an option is none of ``longspan read``'s, or not a number that it may be.
        """
        numbers = {}
        for key, value in self.options.items():
            if key not in _READ_OPTIONS or (key == "top" and self.attention != "extractive"):
                known = [name for name in _READ_OPTIONS if name != "top" or self.attention == "extractive"]
                raise ValueError(f"{self.attention} has no option {key}; it has {', '.join(known)}")
            if not value.isdecimal():
                raise ValueError(f"{self.attention}: {key}={value} is not a whole number")
            numbers[key] = int(value)
        return ReadOptions(method=self.attention, citations=0, **numbers)  # type: ignore[arg-type]

    @property
    def command(self) -> str:
        """The command that serves it; of a reading the one that reads."""
        if self.is_reading:
            options = [(f"--{key.replace('_', '-')}", value) for key, value in self.options.items()]
            chosen = ["--method", self.attention, *(part for option in options for part in option)]
            return shlex.join(["longspan", "read", "FILE", "--question", "QUESTION", *chosen])
        return shlex.join(["longspan", "serve", *self.arguments])


_READ_OPTIONS = ("passage_tokens", "overlap", "top", "max_tokens")


def parse(text: str) -> Deployment:
    """A deployment from ``"sliding_window window=512 sinks=4"``, a reading from ``"extractive top=8"``.

    Raises:
        ValueError: it is not of that form.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"the candidate {text!r} can't be read: {error}; quote it like a shell") from error
    if not words or "=" in words[0] or any("=" not in word for word in words[1:]):
        raise ValueError(
            f"{text!r} is not a candidate; write a backend and its options, like 'sliding_window window=512'"
        )
    if words[0] == "whole":
        raise ValueError(
            "whole is how full attention reads, which is always there; leave out the candidate whole"
        )
    pairs = [word.split("=", 1) for word in words[1:]]
    options = dict(pairs)
    if len(options) < len(pairs):
        raise ValueError(f"the candidate {text!r} gives an option twice; give each once")
    found = Deployment(" ".join(text.split()), words[0], options)
    if found.is_reading:
        found.read_options()  # refuses options that it does not have
    return found


def window(size: int, sinks: int) -> Deployment:
    """A sliding window at the keys' original positions."""
    options = {"window": str(size), "sinks": str(sinks)}
    return Deployment(f"window {size} + {sinks} sinks", "sliding_window", options)


def sparse(name: str, pattern: str, **options: int | str) -> Deployment:
    """A sparse pattern."""
    texts = {key: str(value) for key, value in options.items()}
    return Deployment(name, "sparse", {"pattern": pattern, **texts})


def topk(budget: int) -> Deployment:
    """The pages that score highest for each query; the first and the most recent are always selected."""
    return sparse(f"top-k {budget}", "topk", budget=budget)


def oracle(budget: int) -> Deployment:
    """The tokens with the most attention weight for each query, as many as ``topk`` sees: to measure with."""
    return sparse(f"oracle {budget}", "oracle", budget=budget)


FULL = Deployment("full")
