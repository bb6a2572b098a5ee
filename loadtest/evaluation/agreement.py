"""Whether a variant answers as full attention does, where the right answer is not known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loadtest.evaluation.ask import Asked
from loadtest.evaluation.types import Answer


def same_tokens(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """The share of an answer up to which it is another's, token by token; 1 if and only if both are the same.

    Tokens after the first difference tell nothing: from there on two models continue two texts.
    """
    longest = max(len(ours), len(theirs))
    same = 0
    for one, other in zip(ours, theirs, strict=False):
        if one != other:
            break
        same += 1
    return same / longest if longest else 1.0


def agreeing(asked: Sequence[Asked], full: Sequence[Asked]) -> list[Answer]:
    """A variant's rows, where questions without a known answer have the agreement with full as their score.

    Args:
        asked: of the variant.
        full: of full attention, the same questions in the same order; its own rows keep a score of NaN.
    """
    return [_agreeing(own, theirs) for own, theirs in zip(asked, full, strict=True)]


def _agreeing(own: Asked, full: Asked) -> Answer:
    if own.answer.answer or own.answer.error:
        return own.answer
    if full.answer.error:  # a row with an error is asked again by a later run, as full's own is
        return replace(own.answer, error=f"full attention has no answer: {full.answer.error}")
    return replace(own.answer, score=same_tokens(own.token_ids, full.token_ids))
