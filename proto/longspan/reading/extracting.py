"""Extractive reading: the passages that most likely answer the question, and an answer from these."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from longspan.reading import prompts
from longspan.reading.session import Session
from longspan.reading.types import Note, Passage

JOINT_TOKENS = 8
"""At most, of what separates a passage from the next."""


async def extracted(
    session: Session,
    passages: Sequence[Passage],
    question: str,
    max_tokens: int,
    top: int,
) -> Note:
    """The answer from the passages under which the question is most likely.

    Passages are ranked by the log probability of the question after a request to write one that the passage
    answers (Sachan et al. 2022, "Improving passage retrieval with zero-shot question generation", section
    2.2). That needs no encoder, and no model whose yes or no can be relied on.

    Args:
        session: with the server.
        passages: of the document.
        question: not empty.
        max_tokens: of the answer.
        top: passages to answer from.

    Raises:
        longspan.LongspanError: a request failed.
    """
    ids = await session.tokens(question)
    scores = await session.all(
        "scoring passages",
        [functools.partial(session.score, prompts.question_for(passage.text), ids) for passage in passages],
    )
    best = sorted(sorted(range(len(passages)), key=lambda index: -scores[index])[:top])
    prompt = prompts.answer([passages[index].text for index in best], question)
    (answer,) = await session.all(
        "answering", [functools.partial(session.write, prompt, max_tokens, tuple(best))]
    )
    return answer
