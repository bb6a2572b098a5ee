"""The prompts of all methods.

A passage comes first and what is asked of it last: so the server's prefix cache has the passage for every
stage, and for every further question about the document.
"""

from __future__ import annotations

from collections.abc import Sequence

NOTHING = "NOT STATED"
"""The answer that a model is asked for where a passage does not say it."""


def _after(passage: str, instruction: str) -> str:
    return f"Passage of a long document:\n{passage}\n\n{instruction}"


def note(passage: str, question: str) -> str:
    """Asks for what one passage says about the question; without one for its summary."""
    if question:
        return _after(
            passage,
            "Answer the question from this passage, in one sentence. If the passage does not say it, answer "
            f"{NOTHING}.\n\nQuestion: {question}",
        )
    return _after(passage, "Summarize this passage in two or three sentences.")


def question_for(passage: str) -> str:
    """Asks for a question that a passage answers."""
    return _after(passage, "Write a question that this passage answers.")


def answer(passages: Sequence[str], question: str) -> str:
    """Asks for the answer from several passages."""
    joined = "\n\n".join(passages)
    return (
        f"Passages of a long document:\n{joined}\n\nAnswer the question from these.\n\nQuestion: {question}"
    )


def merge(notes: Sequence[str], question: str) -> str:
    """Asks for one answer, or one summary, of several that were written from parts of a document."""
    listed = "\n".join(f"- {text}" for text in notes)
    if question:
        return (
            f"Answers from several passages of a long document:\n{listed}\n\nGive the one answer that they "
            f"support.\n\nQuestion: {question}"
        )
    return (
        f"Summaries of the parts of a long document:\n{listed}\n\nSummarize the whole document in one "
        "paragraph."
    )
