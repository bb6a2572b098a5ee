"""The text side of a model that has none."""

from __future__ import annotations

from collections.abc import Sequence

from server.text.chat import Messages
from server.text.errors import TextError
from server.text.tokenizer import Tokenizer

_NONE = "this model has no tokenizer; send token ids"


class NoTokenizer(Tokenizer):
    """Token ids are all that goes in and comes out; no token has a text."""

    def __init__(self) -> None:
        self.folder = None
        self.chat_template = None
        self.has_text = False
        self.has_chat_template = False
        self.chat_refusal = "has no tokenizer"
        self.byte_level = True
        self.vocabulary_size = 0
        self.longest_token_bytes = 1
        self.eos_token = None
        self.mask_token = None
        self.special_tokens = {}
        self.special_token_ids = frozenset()
        self.token_text = _no_text

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        special_tokens_as_text: bool = False,
        most: int | None = None,
    ) -> list[int]:
        """Refuses.

        Raises:
            TextError: always.
        """
        raise TextError("text", _NONE)

    def encode_chat(
        self, messages: Messages, *, special_tokens_as_text: bool = False, most: int | None = None
    ) -> list[int]:
        """Refuses.

        Raises:
            TextError: always.
        """
        raise TextError("chat", _NONE)

    def decode_known(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """No text."""
        return ""

    def token_id(self, token: str) -> int | None:
        """None."""
        return None

    def token(self, token_id: int) -> str:
        """No entry."""
        return ""


def _no_text(token_id: int) -> str:
    return ""
