"""From samples to the token ids that are sent: the same for every deployment of a model."""

from __future__ import annotations

from dataclasses import dataclass

from loadtest.tasks.types import Sample
from longspan import Client


@dataclass(frozen=True, slots=True)
class Prompt:
    """The token ids sent for one sample.

    Attributes:
        ids: of context, question and what the answer begins with.
        target: of the right answer; empty if there is none.
    """

    ids: tuple[int, ...]
    target: tuple[int, ...]


def prompt(client: Client, sample: Sample, *, chat: bool) -> Prompt:
    """Token ids of a sample, by the server's tokenizer.

    The whole text is tokenized at once, as it would be for a user who sent it. Prompts about one context then
    have the same tokens up to a few before the question, since a tokenizer looks no further than about a word
    ahead; so the prefix cache gives them all of the context but its last page.

    Args:
        client: of any server of the model.
        sample: the question.
        chat: asks it as a user of a conversation, through the model's chat template; the answer then begins,
            in the assistant's turn, with ``answer_prefix``. A sample of messages is always asked so.

    Raises:
        longspan.LongspanError: the server refuses it, as for a model without a chat template.
    """
    asked = sample.context + sample.question
    if chat or sample.messages:
        # Ends with the template's opening of an answer: the server renders it so.
        messages = sample.messages or [("user", asked)]
        rendered = client.tokenize(messages, special_tokens_as_text=True).token_ids
        ids = (*rendered, *plain(client, sample.answer_prefix))
    else:
        ids = tuple(client.tokenize(asked + sample.answer_prefix, special_tokens_as_text=True).token_ids)
    return Prompt(ids, continuation(client, sample.answer_prefix, sample.target))


def continuation(client: Client, before: str, text: str) -> tuple[int, ...]:
    """Token ids of ``text`` as a model would write it after ``before``.

    Some tokenizers put a space before any text, so ``text`` is tokenized behind ``before`` and that is taken
    off. Where a token would span both, which a model can't generate at that point, ``text`` is tokenized by
    itself.
    """
    if not text:
        return ()
    head, whole = plain(client, before), plain(client, before + text)
    return whole[len(head) :] if whole[: len(head)] == head else plain(client, text)


def special_before(client: Client) -> tuple[int, ...]:
    """Special tokens that the model's tokenizer puts before a text."""
    text = "a"
    whole = tuple(client.tokenize(text).token_ids)
    return whole[: whole.index(plain(client, text)[0])]


def plain(client: Client, text: str) -> tuple[int, ...]:
    """Token ids of a text, without special tokens."""
    if not text:
        return ()
    found = client.tokenize(text, special_tokens=False, special_tokens_as_text=True)
    return tuple(found.token_ids)
