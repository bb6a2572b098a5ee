"""Units of the evaluation: steps that are small enough to go between rounds of speed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from loadtest.compare.types import Comparison, Plan
from loadtest.deployment import Deployment
from loadtest.evaluation.pairs import OWN, answer_key
from loadtest.evaluation.text import Slice
from loadtest.evaluation.types import Answer, Memory, TextBlock
from loadtest.measuring.types import length_label

Row = TypeVar("Row", Answer, TextBlock, Memory)

_AHEAD = 6
"""Contexts of the longest, of all tasks together, that come first: no verdict of "safe" takes fewer."""

_OWN_ROUNDS = 8
"""Rounds over which the user's own questions are spread."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One step: one context with all its questions, or one slice of the text, on every candidate.

    Attributes:
        kind: of what is measured.
        length: context length; 0 for the user's own questions, which have lengths of their own.
        index: number of the context, or of the slice.
        task: name of the task, for ``answers``.
    """

    kind: Literal["text", "memory", "answers"]
    length: int
    index: int = 0
    task: str = ""

    @property
    def measure(self) -> str:
        """The ``Evidence.measure`` that it adds to; that of single tasks is ``tasks`` too."""
        return self.task if self.task == OWN else "tasks" if self.kind == "answers" else self.kind

    @property
    def label(self) -> str:
        """A description in a few words."""
        if self.kind == "answers" and self.task == OWN:
            return f"your own questions, context {self.index + 1}"
        at = length_label(self.length)
        if self.kind == "answers":
            return f"{self.task} at {at}, context {self.index + 1}"
        return f"text at {at}, slice {self.index + 1}" if self.kind == "text" else f"KV cache at {at}"


@dataclass(slots=True)
class Rows:
    """The results of a unit.

    Attributes:
        answers: rows of questions.
        text: rows of blocks.
        memory: rows of the KV cache.
        failed: candidates whose server has ended meanwhile, by name: why.
    """

    answers: list[Answer] = field(default_factory=list)
    text: list[TextBlock] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def add_to(self, comparison: Comparison) -> None:
        """Puts the rows into a comparison, in the place of those that it has for the same."""
        comparison.answers = _replaced(comparison.answers, self.answers, answer_key)
        comparison.text = _replaced(comparison.text, self.text, lambda row: (row.length, row.block))
        comparison.memory = _replaced(comparison.memory, self.memory, lambda row: row.length)
        comparison.failed.update(self.failed)


def _replaced(rows: list[Row], new: list[Row], key: Callable[[Row], Hashable]) -> list[Row]:
    there = {(row.deployment, key(row)) for row in new}
    return [row for row in rows if (row.deployment, key(row)) not in there] + new


def order(
    contexts: Sequence[int],
    tasks: Sequence[str],
    slices: Mapping[int, Sequence[Slice]],
    own: Sequence[int] = (),
    most: int | None = None,
    beyond: Sequence[int] = (),
) -> Iterator[Unit]:
    """All units, in rounds that give every length a slice of text and every task a context.

    The second round begins with the longest length, and brings it to ``_AHEAD`` contexts: variants lose most
    there, a loss beyond the margin is hardly sure from fewer, and once it is nothing else need be measured.
    Otherwise the evidence for all is about equal whenever time is up.

    Args:
        contexts: lengths.
        tasks: their names.
        slices: of the text, by length.
        own: numbers of the contexts of the user's own questions.
        most: contexts of each task and length; ``None`` never ends.
        beyond: lengths that the model's context does not hold, at which tasks are asked and nothing else.
    """
    per_round = -(-len(own) // _OWN_ROUNDS)
    ahead = -(-_AHEAD // max(1, len(tasks)))
    for number in itertools.count():
        units = []
        for length in contexts if number == 0 else reversed(contexts):
            once = [Unit("text", length, number)] if number < len(slices[length]) else []
            once += [Unit("memory", length)] if number == 0 else []
            # The tasks of the longest come before its text, once each kind was seen.
            asked = [
                Unit("answers", length, index, task)
                for index in (_of_round(number, ahead) if length == contexts[-1] else (number,))
                if most is None or index < most
                for task in tasks
            ]
            units += [*once, *asked] if number == 0 else [*asked, *once]
        if most is None or number < most:
            units += [Unit("answers", length, number, task) for length in beyond for task in tasks]
        units += [
            Unit("answers", 0, index, OWN) for index in own[number * per_round : (number + 1) * per_round]
        ]
        if not units:
            return
        yield from units


def _of_round(number: int, ahead: int) -> range:
    """Contexts of a task at the longest length in a round; together they are all, each once."""
    if number == 0:
        return range(1)
    last = number + max(ahead - 2, 0)
    return range(1 if number == 1 else last, last + 1)


def lacking(unit: Unit, comparison: Comparison, part: Slice | None = None) -> set[str]:
    """Candidates that have not failed and of which a comparison has no rows of the unit.

    Args:
        unit: the unit.
        comparison: with the rows.
        part: the slice of a unit of text.
    """
    if unit.kind == "answers":
        rows = comparison.answers
        place = (unit.task, unit.length, unit.index)
        have = {row.deployment for row in rows if answer_key(row).context == place}
    elif unit.kind == "text":
        assert part is not None
        # All blocks of a slice come together, so the first stands for all.
        place_of = (part.length, part.first_block)
        have = {row.deployment for row in comparison.text if (row.length, row.block) == place_of}
    else:
        have = {row.deployment for row in comparison.memory if row.length == unit.length}
    able = {one.name for one in comparison.plan.candidates if is_for(unit, comparison.plan, one)}
    return able - comparison.failed.keys() - have


def is_for(unit: Unit, plan: Plan, candidate: Deployment) -> bool:
    """A unit can be done on a candidate.

    A reading answers tasks only: it decodes no text, keeps no sequence in the KV cache, and the user's own
    questions need not come with a document. Attention variants can't be asked beyond the model's context.
    """
    if candidate.is_reading:
        return unit.kind == "answers" and unit.task != OWN
    return unit.length not in plan.beyond
