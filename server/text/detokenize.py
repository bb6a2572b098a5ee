"""Token ids to text while they arrive, never splitting a character."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it brings the tokenizers library
    from server.text.decoding import Decoding

_REPLACEMENT = "\ufffd"

# A character has at most four bytes and a token at least one. So what decodes to U+FFFD at the end of the
# text may be the beginning of a character for some tokens, and is none after this many.
_OPEN_TOKENS = 8
# A tail of more tokens than this that never becomes text is cut ...
_CLOSED_TOKENS = 32
# ... to this many. The U+FFFD held back then have at most three bytes each; another three are
# enough for UTF-8 to find its characters' boundaries.
_KEPT_TOKENS = 16
_KEPT_CHARACTERS = 3


class Detokenizer:
    """One sequence's text: what ``push`` and ``flush`` return, joined, is the text of all its tokens.

    Decodes the new tokens together with a few before them: some decoders treat the beginning of a text
    differently, and a character may span tokens. The cost of a token does not grow with the text.

    A tokenizer with byte fallback (Llama 2) decodes a run of byte tokens with an error in it to nothing but
    U+FFFD. For malformed output of such a model, characters completed before the error are kept instead.

    Args:
        tokenizer: the model's.
        skip_special_tokens: special tokens are no text.

    Attributes:
        held: characters at the end of the text that are held back, since later tokens may change them.
    """

    def __init__(self, tokenizer: Decoding, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        # Tokens from the last but one boundary of characters on; the boundary after; the text given so far.
        self._window: list[int] = []
        self._boundary = 0
        self._given = 0
        self.held = 0

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these tokens complete; may be empty."""
        return "".join([self._push(token) for token in tokens])

    def fork(self) -> Detokenizer:
        """Another one that goes on from here."""
        other = copy.copy(self)
        other._window = list(self._window)
        return other

    def flush(self) -> str:
        """The text held back, when no more tokens come."""
        text = self._decode(self._window)[self._given :]
        self._given += len(text)
        self.held = 0
        return text

    def _push(self, token: int) -> str:
        if self._boundary == len(self._window) and self._tokenizer.byte_level:
            # The text so far is whole characters; if this token is too, the two don't touch each other.
            alone = self._tokenizer.decode_alone(token, self._skip_special_tokens)
            if _REPLACEMENT not in alone:
                if alone:
                    self._window, self._boundary, self._given = [token], 1, len(alone)
                return alone
        # A token without text must not stand between the parts of a character.
        if not self._tokenizer.is_text(token, skip_special_tokens=self._skip_special_tokens):
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        tail = len(text) - len(text.rstrip(_REPLACEMENT))
        new_tokens = len(self._window) - self._boundary
        if tail and new_tokens > _OPEN_TOKENS:
            tail = min(tail, _KEPT_CHARACTERS)
        self.held = min(tail, max(len(text) - self._given, 0))
        end = max(len(text) - tail, self._given)
        new, self._given = text[self._given : end], end
        if not tail:
            self._window = self._window[self._boundary :]
            self._boundary = len(self._window)
            self._given = len(self._decode(self._window))
        elif new_tokens > _CLOSED_TOKENS:
            self._window = self._window[-_KEPT_TOKENS:]
            self._boundary = 0
            self._given = len(self._decode(self._window)) - tail
        return new

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode_known(tokens, skip_special_tokens=self._skip_special_tokens)
