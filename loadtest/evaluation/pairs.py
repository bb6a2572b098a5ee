"""Rows of two deployments side by side: a question that one could not answer counts for neither."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

from loadtest.evaluation.types import Answer, TextBlock
from loadtest.tasks.own import TASK

OWN = TASK
"""Task of the user's own questions."""


class AnswerKey(NamedTuple):
    """Which question a row answers; a tuple, since thousands are hashed whenever a comparison is judged."""

    task: str
    length: int
    number: int
    turn: int

    @property
    def context(self) -> tuple[str, int, int]:
        """The key that questions about one context share."""
        return self.task, self.length, self.number


class AnswerPair(NamedTuple):
    """One question, answered under full attention and under a variant."""

    full: Answer
    own: Answer

    @property
    def context(self) -> tuple[str, int, int]:
        """The key that questions about one context share; their answers depend on one another."""
        return answer_key(self.full).context


class BlockPair(NamedTuple):
    """The same tokens, decoded under full attention and under a variant."""

    full: TextBlock
    own: TextBlock


Row = TypeVar("Row", Answer, TextBlock)


def answer_key(answer: Answer) -> AnswerKey:
    """The question of a row."""
    return AnswerKey(answer.task, answer.length, answer.index, answer.turn)


def answer_pairs(answers: Iterable[Answer], full: str, own: str) -> list[AnswerPair]:
    """Answers of two deployments to the same questions, in the order of the questions.

    Args:
        answers: of any deployments; of two rows for one question the later counts.
        full: name of the one that is the measure.
        own: name of the other.
    """
    rows = list(answers)
    theirs = {answer_key(row): row for row in _whole(rows, full)}
    ours = {answer_key(row): row for row in _whole(rows, own)}
    return [AnswerPair(theirs[key], ours[key]) for key in sorted(theirs.keys() & ours.keys())]


def block_pairs(blocks: Iterable[TextBlock], length: int, full: str, own: str) -> list[BlockPair]:
    """Blocks of two deployments of the same tokens, in the order of their numbers.

    Args:
        blocks: of any deployments and lengths; of two rows for one block the later counts.
        length: that they belong to.
        full: name of the deployment that is the measure.
        own: name of the other.

    Raises:
        ValueError: two blocks of one number are not of the same tokens.
    """
    rows = [row for row in blocks if row.length == length]
    theirs = {row.block: row for row in _whole(rows, full)}
    ours = {row.block: row for row in _whole(rows, own)}
    pairs = [BlockPair(theirs[block], ours[block]) for block in sorted(theirs.keys() & ours.keys())]
    for pair in pairs:
        if (pair.full.start, len(pair.full.logprobs)) != (pair.own.start, len(pair.own.logprobs)):
            raise ValueError(
                f"block {pair.full.block} at {length} tokens differs between {full!r} and {own!r}: the rows "
                "come from different runs; measure again into a new file"
            )
    return pairs


def _whole(rows: Iterable[Row], deployment: str) -> Iterator[Row]:
    return (row for row in rows if row.deployment == deployment and not row.error)
