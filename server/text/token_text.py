"""The text of a single token within others, whatever the decoder does at a text's ends."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

from server.panics import without_panics

if TYPE_CHECKING:  # it brings transformers, whose import takes a second
    from tokenizers import Tokenizer

# Anchors are common: of a vocabulary without one, no more is searched than this.
_CANDIDATES = 100_000


class _Anchor(NamedTuple):
    """A token that is put around another, and the text that it adds before and behind."""

    token: int
    before: str
    behind: str


class TokenTexts:
    """Texts of tokens, kept once they are known.

    A token's text is what it adds between two others: decoders drop a space at the beginning of a text
    (SentencePiece) or at its end (vocabularies whose words end with ``</w>``), and those who join words
    (WordPiece) put none before the first. Joined, the texts of a text's tokens are that text, but for what
    is dropped at its ends.

    Args:
        backend: the tokenizer.
        byte_level: its tokens stand for the same bytes wherever they are.

    Attributes:
        of: the text of a token id; special tokens are spelled out.
    """

    def __init__(self, backend: Tokenizer, *, byte_level: bool) -> None:
        self._backend: Any = backend
        self._anchor = None if byte_level else _find_anchor(backend)
        self.of = functools.lru_cache(maxsize=65536)(self._of)

    def _of(self, token: int) -> str:
        if self._anchor is None:
            return self._decode(token)
        anchor, before, behind = self._anchor
        within = self._decode(anchor, token, anchor)
        if len(within) >= len(before) + len(behind) and within.endswith(behind):
            return within[len(before) : len(within) - len(behind)]
        return self._decode(anchor, token)[len(before) :]

    @without_panics
    def _decode(self, *tokens: int) -> str:
        text: str = self._backend.decode(tokens, skip_special_tokens=False)
        return text


def _find_anchor(backend: Any) -> _Anchor | None:
    """A token of letters or digits: best one that touches what is beside it, else one that is a word."""
    word = None
    special = backend.get_added_tokens_decoder()
    for token in range(min(backend.get_vocab_size(), _CANDIDATES)):
        entry = backend.id_to_token(token)
        if not entry or not entry.isalnum() or token in special:
            continue
        alone, twice = backend.decode([token]), backend.decode([token, token])
        if alone != entry or not twice.startswith(alone):
            continue
        if twice == alone + alone:
            return _Anchor(token, alone, alone)
        word = word or _Anchor(token, alone, twice.removeprefix(alone))
    return word
