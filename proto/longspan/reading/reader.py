"""Reads a document that may be longer than the model's context."""

from __future__ import annotations

from typing import NamedTuple

from longspan.aio import AsyncClient
from longspan.reading import prompts
from longspan.reading.cut import Cutter
from longspan.reading.document import Document
from longspan.reading.extracting import JOINT_TOKENS, extracted
from longspan.reading.gain import cite
from longspan.reading.merging import LISTED_TOKENS, merged, note_tokens
from longspan.reading.session import Session
from longspan.reading.types import Note, Reading, ReadOptions, Spent

_LEAST_PASSAGE = 32  # tokens
_LEAST_NOTES = 2  # that fit into a prompt, or merging would not end


async def read(
    client: AsyncClient, content: bytes, question: str = "", options: ReadOptions | None = None
) -> Reading:
    """The answer to a question about a document, or its summary, by many short requests.

    The most likely tokens are taken throughout. Cancelling the task cancels all requests on the server. One
    that a busy server turns away is sent again when the server says, up to 30 times; one that meets a server
    that is away, as while it restarts, for two minutes.

    Args:
        client: of the server.
        content: of the document, UTF-8.
        question: about it; empty for a summary.
        options: how to read it; the defaults without them.

    Raises:
        ValueError: the content is not UTF-8 text, the method needs a question, or the context is too short
            for the options; says what to change.
        longspan.LongspanError: a request failed.
    """
    options = options or ReadOptions()
    question = question.strip()
    if options.method == "extractive" and not question:
        raise ValueError("extractive reading needs a question; give one, or take another method")
    document = Document(content)
    info = await client.model_info(options.model)
    spent = Spent()
    session = Session(client, options, info.has_chat_template, spent)
    room = await _room(session, options, question, info.context_length)
    cutter = Cutter(document, session, room.passage, min(options.overlap, room.passage // 2))
    await cutter.measure()
    whole = (0, document.bounds[-1])
    parts = cutter.packed(document.sections()) if options.method == "hierarchical" else [whole]
    cut = await cutter.passages(parts)
    passages = [passage for part in cut for passage in part]
    if options.method == "extractive":
        answer: Note | None = await extracted(session, passages, question, options.max_tokens, room.top)
    else:
        numbers = iter(range(len(passages)))
        sections = [[next(numbers) for _ in part] for part in cut]
        answer = await merged(session, sections, passages, question, options.max_tokens, room.notes)
    return Reading(
        text=answer.text if answer else "",
        complete=answer.complete if answer else True,
        citations=await cite(session, passages, answer, question, options.citations) if answer else (),
        passages=len(passages),
        passage_tokens=room.passage,
        used=len(answer.sources) if answer else 0,
        method=options.method,
        model=info.name,
        spent=spent,
    )


class _Room(NamedTuple):
    """Tokens that the context has room for.

    Attributes:
        passage: of a passage.
        notes: of the notes that are merged in one request.
        top: passages that one answer is written from.
    """

    passage: int
    notes: int
    top: int


async def _room(session: Session, options: ReadOptions, question: str, context: int) -> _Room:
    beside = context - await session.count_prompt(prompts.note("", question))
    answers = max(note_tokens(question), options.max_tokens)
    passage = min(options.passage_tokens, beside - answers)
    notes = context - await session.count_prompt(prompts.merge([], question)) - answers
    joint = context - await session.count_prompt(prompts.answer([], question)) - answers
    top = joint // (passage + JOINT_TOKENS) if passage > 0 else 0
    if passage < _LEAST_PASSAGE or notes < _LEAST_NOTES * (note_tokens(question) + LISTED_TOKENS):
        raise ValueError(
            f"the context of {context} tokens has no room for passages beside the question and "
            f"{options.max_tokens} tokens of an answer (max_tokens); lower these, or shorten the question"
        )
    return _Room(passage, notes, max(1, min(options.top, top)))
