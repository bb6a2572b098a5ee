"""One question with a known answer. Nothing here asks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Sample:
    """One question about one context. Where kvpress's evaluation sets have a field, it has its name.

    Attributes:
        task: which kind; see ``loadtest.tasks``.
        context: the long text, with what the model is told to do before it.
        question: what is asked after it.
        answer_prefix: words that the answer begins with; they belong to the prompt.
        answer: what the answer must contain; empty if that is not known.
        max_new_tokens: the answer may have.
        target: the right answer as the model would go on after ``answer_prefix``, leading space included;
            its log probability tells variants apart where greedy answers fail. Empty if it is not known.
        length: tokens of prompt and answer together, at most, by the model's tokenizer; 0 for the user's own
            questions.
        index: number of the context; samples of one task, length and index share their context.
        turn: number of the question about that context.
        depth: where in the context the answer stands, 0 to 1; ``None`` if in several places or all over it.
        match: how ``answer`` is looked for: ``all``: the share of its entries that the prediction contains,
            case ignored; ``regex``: 1 if the only entry matches somewhere; ``json``: 1 if the prediction has
            a JSON value equal to the entry's.
        messages: role and content of each message, where a whole conversation is asked instead of ``context``
            and ``question``; always through the model's chat template.
    """

    task: str
    context: str
    question: str
    answer_prefix: str
    answer: tuple[str, ...]
    max_new_tokens: int
    target: str
    length: int
    index: int = 0
    turn: int = 0
    depth: float | None = None
    match: Literal["all", "regex", "json"] = "all"
    messages: tuple[tuple[str, str], ...] = ()


Count = Callable[[str], int]
"""How many tokens a text has by the model's tokenizer, without special tokens."""
