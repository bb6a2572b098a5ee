"""Text to token ids, beside other threads."""

from __future__ import annotations

import os

from tokenizers import Tokenizer

from server.panics import without_panics
from server.text.errors import TooManyTokensError

# A batch of one text needs no threads of the library's own.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@without_panics
def token_ids(
    backend: Tokenizer, text: str, *, add_special_tokens: bool, most: int | None = None
) -> list[int]:
    """Token ids of a text. Other threads run meanwhile: a long text takes seconds.

    Args:
        backend: the tokenizer.
        text: what to encode.
        add_special_tokens: add those with which the model expects a text to begin or end.
        most: how many there may be; ``None`` for any number.

    Raises:
        TooManyTokensError: there are more.
    """
    # ``encode`` would keep the interpreter's lock; this also finds no offsets, which is faster.
    (encoding,) = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    # The list is made with the interpreter's lock held.
    if most is not None and (count := len(encoding)) > most:
        del encoding  # some 150 bytes for each token, which the error's traceback would keep
        raise TooManyTokensError(count, most)
    ids: list[int] = encoding.ids
    return ids
