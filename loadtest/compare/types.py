"""What a comparison of attention variants consists of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loadtest.quality.types import Deployment


@dataclass(frozen=True, slots=True)
class Candidate:
    """An attention variant to be compared.

    Attributes:
        deployment: as it would be served.
        predicting: the same for measuring perplexity, where that takes other options: a pattern that leaves
            prompts alone must apply to them, or perplexity would be full attention's.
        exact: it computes full attention.
    """

    deployment: Deployment
    predicting: Deployment
    exact: bool = False

    @property
    def name(self) -> str:
        """What tables call it."""
        return self.deployment.name


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure. Two runs of one plan on one model can be joined.

    Attributes:
        candidates: the first is full attention, which the others are held against.
        contexts: lengths in tokens, ascending.
        text: where the text came from: a file's name, or words.
        text_hash: of its content.
        depths: where needles stand, as shares of the text.
        keys_per_depth: needles at each.
        slices: of the text, for perplexity.
        output_tokens: of each timed stream.
        prompts: the user's own, whose answers are compared.
        arguments: of ``longspan serve``, for every server.
    """

    candidates: tuple[Candidate, ...]
    contexts: tuple[int, ...]
    text: str
    text_hash: str
    depths: tuple[float, ...]
    keys_per_depth: int
    slices: int
    output_tokens: int
    prompts: tuple[str, ...]
    arguments: tuple[str, ...]


Cell = Mapping[str, Any]
"""One measurement's figures, or ``{"error": sentence}``."""


@dataclass(frozen=True, slots=True)
class Row:
    """A candidate at one context length; NaN or ``None`` where there is no figure.

    Attributes:
        candidate: its name.
        context: tokens.
        prefill_rate: prompt tokens per second.
        ttft: time to first token of a prompt of that length, seconds.
        tpot: time per output token after it, seconds.
        kv_bytes: KV cache held by one sequence.
        fits: sequences of that length that the server's KV cache holds at once.
        perplexity: of the text's last three quarters.
        found: needles found by depth.
        hidden: needles hidden by depth.
        errors: what could not be measured, and why.
    """

    candidate: str
    context: int
    prefill_rate: float = math.nan
    ttft: float = math.nan
    tpot: float = math.nan
    kv_bytes: float = math.nan
    fits: float = math.nan
    perplexity: float = math.nan
    found: dict[float, int] = field(default_factory=dict)
    hidden: dict[float, int] = field(default_factory=dict)
    errors: tuple[str, ...] = ()

    @property
    def found_share(self) -> float:
        """Needles found, of those hidden; NaN if none was."""
        hidden = sum(self.hidden.values())
        return sum(self.found.values()) / hidden if hidden else math.nan


@dataclass(slots=True)
class Comparison:
    """A comparison, whole or in the making.

    Attributes:
        plan: what is measured.
        created: UTC, ISO 8601.
        machine: what it runs on.
        versions: of Longspan and what it runs on.
        model: name, architecture, dtype, kv_dtype, device, parameters.
        kernels: what computed each candidate, and why.
        cells: figures by ``candidate | context | measurement``.
    """

    plan: Plan
    created: str
    machine: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    kernels: dict[str, dict[str, str]] = field(default_factory=dict)
    cells: dict[str, Cell] = field(default_factory=dict)

    def cell(self, candidate: str, context: int, measurement: str) -> Cell | None:
        """A measurement's figures; ``None`` if it was not made."""
        return self.cells.get(key(candidate, context, measurement))

    def rows(self) -> list[Row]:
        """All candidates at all contexts, as far as there are figures."""
        return [
            self._row(candidate.name, context)
            for candidate in self.plan.candidates
            for context in self.plan.contexts
        ]

    def row(self, candidate: str, context: int) -> Row:
        """One of them."""
        return self._row(candidate, context)

    def _row(self, candidate: str, context: int) -> Row:
        figures: dict[str, Any] = {}
        errors = []
        for measurement in ("speed", "memory", "perplexity", "needles"):
            cell = self.cell(candidate, context, measurement)
            if cell is None:
                continue
            if "error" in cell:
                errors.append(f"{measurement}: {cell['error']}")
            else:
                figures |= cell
        for name in ("found", "hidden"):
            figures[name] = {float(depth): count for depth, count in figures.get(name, {}).items()}
        return Row(candidate, context, **figures, errors=tuple(errors))


def key(candidate: str, context: int, measurement: str) -> str:
    """Where a measurement's figures are in ``Comparison.cells``."""
    return f"{candidate} | {context} | {measurement}"
