"""How much a passage tells about a text: which notes to keep, and which passages to cite."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from longspan.reading import prompts
from longspan.reading.session import Session
from longspan.reading.types import Citation, Note, Passage

_KEPT = 0.5  # of the best note's gain


async def telling(
    session: Session, notes: Sequence[Note], passages: Sequence[Passage], question: str
) -> list[Note]:
    """The notes that their passages tell, rather than the model by itself.

    A text's gain is its mean log probability given a passage, less that given none: the pointwise mutual
    information of both per token (Holtzman et al. 2021, "Surface form competition", section 3). Small models
    answer from passages that say nothing, some of which make the answer likely and not the question. So notes
    are judged by the sum of the note's and the question's gains. Kept are those with at least half of the
    best one's, since that of a right one depends on the model and on the question.

    Args:
        session: with the server.
        notes: one for each passage, with ``logprob`` given it.
        passages: of the document.
        question: that they answer.

    Returns:
        In their order; none that is empty or says that the passage does not answer the question.

    Raises:
        longspan.LongspanError: a request failed.
    """
    said = [note for note in notes if note.ids and prompts.NOTHING not in note.text.upper()]
    if not said:
        return []
    ids = await session.tokens(question)
    asking = ["", *(passages[note.sources[0]].text for note in said)]
    without, *asked = await session.all(
        "scoring passages",
        [functools.partial(session.score, prompts.question_for(text), ids) for text in asking],
    )
    nothing = prompts.note("", question)
    alone = await session.all(
        "scoring answers", [functools.partial(session.score, nothing, note.ids) for note in said]
    )
    gains = [
        note.logprob - base + score - without for note, base, score in zip(said, alone, asked, strict=True)
    ]
    least = _KEPT * max(0.0, *gains)
    return [note for note, gain in zip(said, gains, strict=True) if gain >= least]


async def cite(
    session: Session, passages: Sequence[Passage], answer: Note, question: str, most: int
) -> list[Citation]:
    """The passages that make an answer more likely, best first.

    As in ContextCite (Cohen-Wang et al. 2024, section 2) a passage is cited for its effect on the answer's
    probability, not because the model names it; here the effect of each by itself.

    Args:
        session: with the server.
        passages: of the document.
        answer: to be cited for, with its ``sources``.
        question: that it answers; empty for a summary.
        most: citations.

    Raises:
        longspan.LongspanError: a request failed.
    """
    if not answer.ids or most == 0:
        return []
    read = [passages[index] for index in answer.sources]
    texts = ["", *(passage.text for passage in read)]
    alone, *given = await session.all(
        "citing",
        [functools.partial(session.score, prompts.note(text, question), answer.ids) for text in texts],
    )
    cited = [
        Citation(passage, score - alone) for passage, score in zip(read, given, strict=True) if score > alone
    ]
    return sorted(cited, key=lambda one: -one.gain)[:most]
