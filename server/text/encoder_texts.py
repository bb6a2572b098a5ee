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


class TooLongError(TooManyTokensError):
    """A text is too long, and may not be cut.

    Attributes:
        index: which.
    """

    def __init__(self, index: int, count: int, most: int) -> None:
        super().__init__(count, most)
        self.index = index


def encoder_texts(
    backend: Tokenizer, texts: Sequence[str], *, most: int, truncate: bool
) -> list[EncoderText]:
    """Token ids of texts. Other threads run meanwhile.

    Args:
        backend: the tokenizer, which neither cuts nor pads.
        texts: what to encode.
        most: tokens of a text, at most.
        truncate: cut longer ones.

    Raises:
        TooLongError: one is longer, and none may be cut.
        TextError: one has a lone surrogate.
    """
    for text in texts:
        check_unicode("texts", text)
    found = []
    for index, encoding in enumerate(backend.encode_batch_fast(list(texts))):
        cut = len(encoding) > most
        if cut and not truncate:
            raise TooLongError(index, len(encoding), most)
        used = _cut(backend, texts[index], most) if cut else encoding
        types = used.type_ids
        found.append(EncoderText(used.ids, types if any(types) else [], cut))
    return found


def _cut(backend: Tokenizer, text: str, most: int) -> Encoding:
    """The text's first tokens, with special ones around them, as the library's own truncation has them."""
    (bare,) = backend.encode_batch_fast([text], add_special_tokens=False)
    bare.truncate(max(0, most - backend.num_special_tokens_to_add(False)))
    return backend.post_process(bare)
