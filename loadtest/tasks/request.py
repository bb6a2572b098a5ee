"""A request to a task: one context of a length, and questions about it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from loadtest.tasks.types import Count, Sample


@dataclass(frozen=True, slots=True)
class Request:
    """One context to make.

    Attributes:
        task: its name.
        count: the model's tokenizer.
        text: running text, for the tasks that hide something in prose.
        length: tokens of prompt and answer together, at most.
        index: number of the context; each is drawn anew.
        seed: of all that is drawn.
        turns: questions to ask about the context, at most.
        reserve: tokens of ``length`` to leave to what is put around the prompt: special tokens and the chat
            template.
    """

    task: str
    count: Count
    text: str
    length: int
    index: int
    seed: int
    turns: int
    reserve: int

    def random(self, purpose: str) -> random.Random:
        """A generator that depends only on the request and the purpose.

        One for each purpose, so that what is drawn for one does not move with how much is drawn for another:
        a context with one sentence more still hides the same needles.
        """
        return random.Random(f"{self.seed} {self.task} {self.length} {self.index} {purpose}")


Make = Callable[[Request], list[Sample]]
"""Makes all samples of one context."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question and its answer, before the context has its size.

    Attributes:
        question: as in ``Sample``.
        answer_prefix: as in ``Sample``.
        answer: as in ``Sample``.
        target: as in ``Sample``.
        evidence: the words of the context that have the answer; empty if it is in several places.
    """

    question: str
    answer_prefix: str
    answer: tuple[str, ...]
    target: str
    evidence: str = ""


@dataclass(frozen=True, slots=True)
class Draft:
    """A context with a given number of items, and the questions about it."""

    context: str
    questions: tuple[Question, ...]
