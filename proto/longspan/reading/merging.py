"""Map-reduce and hierarchical reading: a note of each passage, and these merged into one answer.

Map-reduce (Zhou et al. 2024, "LLM x MapReduce": map, collapse and reduce stages) merges all notes at once, in
as many rounds as their tokens need. Hierarchical reading merges within each section of the document first (Wu
et al. 2021, "Recursively summarizing books with human feedback", section 2; Chang et al. 2023, "BooookScore",
section 2).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from longspan.reading import prompts
from longspan.reading.gain import telling
from longspan.reading.session import SCORED_TOKENS, Session
from longspan.reading.types import Note, Passage

NOTE_TOKENS = 128
"""The most that a summary of a passage has; an answer from one has at most those that are scored."""

LISTED_TOKENS = 8
"""At most, of a note's number and of what separates it from the next."""


def note_tokens(question: str) -> int:
    """The most tokens of a note."""
    return SCORED_TOKENS if question else NOTE_TOKENS


async def merged(
    session: Session,
    sections: Sequence[Sequence[int]],
    passages: Sequence[Passage],
    question: str,
    max_tokens: int,
    room: int,
) -> Note | None:
    """The answer to a question, or the document's summary.

    Args:
        session: with the server.
        sections: indexes of the passages of each; one section for map-reduce.
        passages: of the document.
        question: empty for a summary.
        max_tokens: of the answer.
        room: tokens that a prompt has for notes; at least for two.

    Returns:
        ``None`` if no passage tells one.

    Raises:
        longspan.LongspanError: a request failed.
    """
    notes = await session.all(
        "reading passages",
        [
            functools.partial(
                session.write, prompts.note(passage.text, question), note_tokens(question), (index,)
            )
            for index, passage in enumerate(passages)
        ],
    )
    kept = (
        await telling(session, notes, passages, question)
        if question
        else [note for note in notes if note.ids]
    )
    parts = [[note for note in kept if note.sources[0] in section] for section in map(set, sections)]
    merge = functools.partial(_merge, session, question=question, room=room)
    while any(len(part) > 1 for part in parts) and len(parts) > 1:
        parts = await merge(parts, "merging sections", most=note_tokens(question))
    left = [note for part in parts for note in part]
    while len(left) > 1:
        (left,) = await merge([left], "merging", most=note_tokens(question), last=max_tokens)
    if not left:
        return None
    (answer,) = left
    if len(answer.sources) == 1 and not (answer.complete and len(answer.ids) <= max_tokens):
        prompt = prompts.note(passages[answer.sources[0]].text, question)
        (answer,) = await session.all(
            "answering", [functools.partial(session.write, prompt, max_tokens, answer.sources)]
        )
    return answer


async def _merge(
    session: Session,
    parts: Sequence[Sequence[Note]],
    stage: str,
    *,
    question: str,
    room: int,
    most: int,
    last: int | None = None,
) -> list[list[Note]]:
    """One round: the notes of each part in as few groups as have room, each merged into one.

    Args:
        session: with the server.
        parts: notes that may be merged with one another.
        stage: for the listener.
        question: empty for a summary.
        room: tokens of a group.
        most: tokens of a merged note.
        last: tokens instead of one that is all that is left; ``None`` for no such.
    """
    grouped = [_groups(part, room) for part in parts]
    if last is not None and sum(map(len, grouped)) == 1:
        most = last
    several = [group for groups in grouped for group in groups if len(group) > 1]
    written = await session.all(
        stage,
        [
            functools.partial(
                session.write,
                prompts.merge([note.text for note in group], question),
                most,
                tuple(sorted({source for note in group for source in note.sources})),
            )
            for group in several
        ],
    )
    merged_in_order = iter(written)
    return [[next(merged_in_order) if len(group) > 1 else group[0] for group in groups] for groups in grouped]


def _groups(notes: Sequence[Note], room: int) -> list[list[Note]]:
    groups: list[list[Note]] = []
    left = 0
    for note in notes:
        tokens = len(note.ids) + LISTED_TOKENS
        if not groups or tokens > left:
            groups.append([])
            left = room
        groups[-1].append(note)
        left -= tokens
    return groups
