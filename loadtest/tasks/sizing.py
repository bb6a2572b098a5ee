"""Contexts as long as a number of tokens allows."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from loadtest.tasks.request import Draft, Request
from loadtest.tasks.types import Sample

_PROBE = 16
_INTERPOLATIONS = 8


def fit(
    request: Request,
    build: Callable[[int], Draft],
    least: int,
    max_new_tokens: int,
    most: int | None = None,
) -> list[Sample]:
    """The samples of the longest context that keeps within the request's length.

    Tokens are counted for the context, each question and each answer prefix apart, and added up.

    Args:
        request: what is wanted.
        build: makes the context from a number of items (sentences, words, pairs); with more items it must
            not get shorter.
        least: items that it needs.
        max_new_tokens: that the answer may have.
        most: items that it can have; ``None`` for any number.

    Returns:
        A sample for each question. One item more would be too long.

    Raises:
        ValueError: the length is too short for ``least`` items, or too long for ``most``.
    """
    count = cache(request.count)

    def size(items: int) -> int:
        draft = build(items)
        asked = max(count(each.question) + count(each.answer_prefix) for each in draft.questions)
        return count(draft.context) + asked + max_new_tokens + request.reserve

    smallest = size(least)
    if smallest > request.length:
        raise ValueError(
            f"{request.task} needs at least {smallest} tokens for prompt and answer of a context of "
            f"{request.length}; take a longer context or leave out the task"
        )
    draft = build(_most(size, request.length, least, smallest, most, request.task))
    return [
        Sample(
            task=request.task,
            context=draft.context,
            question=each.question,
            answer_prefix=each.answer_prefix,
            answer=each.answer,
            max_new_tokens=max_new_tokens,
            target=each.target,
            length=request.length,
            index=request.index,
            turn=turn,
            depth=draft.context.index(each.evidence) / len(draft.context) if each.evidence else None,
        )
        for turn, each in enumerate(draft.questions)
    ]


def _most(
    size: Callable[[int], int], length: int, least: int, smallest: int, most: int | None, task: str
) -> int:
    """The largest number of items whose size keeps within the length.

    Every size costs a call of the tokenizer, and sizes grow about evenly with the items: so by interpolation,
    and by halving where that does not converge.
    """
    fits, fits_size = least, smallest
    fails, fails_size = 0, 0  # none known
    slope = 0.0
    probes = 0
    while not fails or fails - fits > 1:
        if fails:
            slope = (fails_size - fits_size) / (fails - fits)
        if fails and probes > _INTERPOLATIONS:
            step = (fails - fits) // 2
        else:
            step = int((length - fits_size) / slope) if slope else _PROBE
        step = max(step, 1)
        if fails:
            step = min(step, fails - fits - 1)
        trial = fits + step
        if most is not None and trial > most:
            if fits == most:
                raise ValueError(
                    f"{task} can fill {fits_size} tokens, not {length}; take a shorter context or leave out "
                    "the task"
                )
            trial = most
        trial_size = size(trial)
        probes += 1
        if trial_size <= length:
            slope = (trial_size - fits_size) / (trial - fits)
            fits, fits_size = trial, trial_size
        else:
            fails, fails_size = trial, trial_size
    return fits
