"""Servers to be measured: one attention variant each."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Deployment:
    """A server to be measured.

    Attributes:
        name: what tables call it.
        attention: ``--attention``.
        options: ``--attention-option``, by key.
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
    def command(self) -> str:
        """The command that serves it."""
        return shlex.join(["longspan", "serve", *self.arguments])


def parse(text: str) -> Deployment:
    """A deployment from ``"sliding_window window=512 sinks=4"``.

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
    pairs = [word.split("=", 1) for word in words[1:]]
    options = dict(pairs)
    if len(options) < len(pairs):
        raise ValueError(f"the candidate {text!r} gives an option twice; give each once")
    return Deployment(" ".join(text.split()), words[0], options)


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
