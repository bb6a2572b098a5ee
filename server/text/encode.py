"""Text to token ids, beside other threads."""

from __future__ import annotations

import os

from tokenizers import Tokenizer

# A batch of one text needs no threads of the library's own.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def token_ids(backend: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    """Token ids of a text. Other threads run meanwhile: a long text takes seconds.

    Args:
        backend: the tokenizer.
        text: what to encode.
        add_special_tokens: add those with which the model expects a text to begin or end.
    """
    # ``encode`` would keep the interpreter's lock; this also finds no offsets, which is faster.
    (encoding,) = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    ids: list[int] = encoding.ids
    return ids
