"""Texts for an encoder: token ids with special tokens and token types, cut where that is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import Encoding, Tokenizer

from server.panics import without_panics
from server.text.errors import TooManyTokensError, check_unicode


class EncoderText(NamedTuple):
    """One text.

    Attributes:
        tokens: ids, special ones included.
        types: token types, as many; empty where all are 0.
        truncated: whether its end is left out.
    """

    tokens: list[int]
    types: list[int]
    truncated: bool = False


Input = str | tuple[str, str]
"""A text, or a pair of texts."""


class TooLongError(TooManyTokensError):
    """A text is too long, and may not be cut.

    Attributes:
        index: which.
    """

    def __init__(self, index: int, count: int, most: int) -> None:
        super().__init__(count, most)
        self.index = index


@without_panics
def encoder_texts(
    backend: Tokenizer, texts: Sequence[Input], *, most: int, truncate: bool
) -> list[EncoderText]:
    """Token ids of texts. Other threads run meanwhile.

    Args:
        backend: the tokenizer, which neither cuts nor pads.
        texts: what to encode.
        most: tokens of a text, or of a pair together, at most; more than the special ones around them.
        truncate: cut longer ones.

    Raises:
        TooLongError: one is longer, and none may be cut.
        TextError: one has a lone surrogate.
    """
    for text in texts:
        for part in [text] if isinstance(text, str) else text:
            check_unicode("texts", part)
    return [_one(backend, index, text, most, truncate=truncate) for index, text in enumerate(texts)]


def _one(backend: Tokenizer, index: int, text: Input, most: int, *, truncate: bool) -> EncoderText:
    # A text at a time: an encoding takes some 150 bytes for each token, of which only the ids are kept.
    parts = backend.encode_batch_fast([text] if isinstance(text, str) else [*text], add_special_tokens=False)
    special = backend.num_special_tokens_to_add(len(parts) > 1)
    count = special + sum(map(len, parts))
    if count > most:
        if not truncate:
            del parts  # which the error's traceback would keep
            raise TooLongError(index, count, most)
        _cut(parts, most - special)
    encoding = backend.post_process(parts[0], parts[1] if len(parts) > 1 else None)
    types = encoding.type_ids
    return EncoderText(encoding.ids, types if any(types) else [], count > most)


def _cut(parts: list[Encoding], room: int) -> None:
    """Keeps the first tokens of a text or a pair, as the library's own truncation does."""
    if len(parts) == 1:
        parts[0].truncate(room)
        return
    # The longer one is cut until both are as long, then both evenly.
    one, other = map(len, parts)
    first = min(one, room // 2) if one <= other else room - min(other, room // 2)
    parts[0].truncate(first)
    parts[1].truncate(room - first)
