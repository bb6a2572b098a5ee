"""The text side of a model that has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from server.text.tokenizer import TextError, Tokenizer, eos_of_configs

_NONE = "this model has no tokenizer; send token ids"


class NoTokenizer(Tokenizer):
    """Token ids are all that goes in and comes out; no token has a text."""

    def __init__(self, folder: Path) -> None:
        """Reads the end-of-sequence tokens from a model's configs.

        Args:
            folder: of the model.
        """
        self.has_text = False
        self.has_chat_template = False
        self.byte_level = True
        self.vocabulary_size = 0
        self.special_token_ids = frozenset()
        self.eos_token_ids = sorted({*eos_of_configs(folder)})
        self.token_text = _no_text

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Refuses.

        Raises:
            TextError: always.
        """
        raise TextError("text", _NONE)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Refuses.

        Raises:
            TextError: always.
        """
        raise TextError("chat", _NONE)

    def decode_known(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """No text."""
        return ""

    def token(self, token_id: int) -> str:
        """No entry."""
        return ""


def _no_text(token_id: int) -> str:
    return ""
