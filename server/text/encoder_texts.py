"""Texts for an encoder: token ids with special tokens and token types, cut where that is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import Encoding, Tokenizer

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


def encoder_texts(
    backend: Tokenizer, texts: Sequence[Input], *, most: int, truncate: bool
) -> list[EncoderText]:
    """Token ids of texts. Other threads run meanwhile.

    Args:
        backend: the tokenizer, which neither cuts nor pads.
        texts: what to encode.
        most: tokens of a text, or of a pair together, at most.
        truncate: cut longer ones.

    Raises:
        TooLongError: one is longer, and none may be cut.
        TextError: one has a lone surrogate.
    """
    for text in texts:
        for part in [text] if isinstance(text, str) else text:
            check_unicode("texts", part)
    found = []
    for index, encoding in enumerate(backend.encode_batch_fast(list(texts))):
        cut = len(encoding) > most
        if cut and not truncate:
            raise TooLongError(index, len(encoding), most)
        used = _cut(backend, texts[index], most) if cut else encoding
        types = used.type_ids
        found.append(EncoderText(used.ids, types if any(types) else [], cut))
    return found


def _cut(backend: Tokenizer, text: Input, most: int) -> Encoding:
    """The text's first tokens, with special ones around them, as the library's own truncation has them."""
    parts = [text] if isinstance(text, str) else list(text)
    bare = backend.encode_batch_fast(parts, add_special_tokens=False)
    room = max(0, most - backend.num_special_tokens_to_add(len(parts) > 1))
    if len(bare) == 1:
        bare[0].truncate(room)
        return backend.post_process(bare[0])
    # The longer one is cut until both are as long, then both evenly.
    one, other = map(len, bare)
    first = min(one, room // 2) if one <= other else room - min(other, room // 2)
    bare[0].truncate(first)
    bare[1].truncate(room - first)
    return backend.post_process(bare[0], bare[1])
