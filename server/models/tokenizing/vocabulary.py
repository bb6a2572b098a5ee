"""The vocabulary in a GGUF file: its tokens, what kind each is, and which of them have a role."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from gguf import TokenType

from server.errors import quoted

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# Some writers say "none" so.
_NO_TOKEN = (-1, 0xFFFF_FFFF)

# Tokens that llama.cpp takes for control tokens by their text, since files often call them something else ...
_END_MARKS = {
    *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>"),
    *("<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<|tool_response>", "<turn|>"),
    *("<end_of_turn>", "<end_of_utterance>", "<｜end▁of▁sentence｜>", "[e~["),  # noqa: RUF001
}
# ... and those that it takes for ends too, but that in some vocabularies are words like any other.
_END_WORDS = {"</s>", "<eos>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]"}


def has_vocabulary(metadata: Mapping[str, Any]) -> bool:
    """Whether the file has a tokenizer; one that says it has none serves token ids."""
    return metadata.get("tokenizer.ggml.model") not in ("none", "no_vocab")


class Vocabulary(NamedTuple):
    """Tokens by their ids.

    Attributes:
        tokens: as the file spells them; empty for an id without a token.
        kinds: ``gguf.TokenType`` of each.
    """

    tokens: list[str]
    kinds: list[int]

    def of_kind(self, *kinds: int) -> dict[str, int]:
        """The tokens of these kinds, with their ids."""
        return {
            token: index
            for index, (token, kind) in enumerate(zip(self.tokens, self.kinds, strict=True))
            if token and kind in kinds
        }

    def ends(self) -> list[int]:
        """Control tokens that end a turn or a text by the convention of llama.cpp, known by their text."""
        control = self.of_kind(TokenType.CONTROL)
        found = {token for token in control if token in _END_MARKS or token in _END_WORDS}
        # Where tool calls end with a token of their own, this one ends only a message of several.
        if {"<|return|>", "<|call|>"} <= found or {"<|flush|>", "<|calls|>"} <= found:
            found.discard("<|end|>")
        return sorted(control[token] for token in found)


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """The file's vocabulary.

    Args:
        metadata: the file's values, by key.

    Raises:
        ValueError: there is none, or it contradicts itself.
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise ValueError("it has no vocabulary (tokenizer.ggml.tokens); use a file that has one")
    seen: dict[str, int] = {}
    for number, token in enumerate(tokens):
        if token and seen.setdefault(token, number) != number:
            raise ValueError(
                f"its tokens {seen[token]} and {number} are both {quoted(token)}; the file is damaged"
            )
    kinds = metadata.get("tokenizer.ggml.token_type")
    if kinds is None:
        kinds = [TokenType.BYTE if _BYTE.fullmatch(token) else TokenType.NORMAL for token in tokens]
        for role in ("bos", "eos"):
            if (index := token_with_role(metadata, role, len(tokens))) is not None:
                kinds[index] = TokenType.CONTROL
    elif len(kinds) < len(tokens):
        raise ValueError(f"it has {len(tokens)} tokens but says the kinds of {len(kinds)}")
    kinds = [
        TokenType.CONTROL if token in _END_MARKS else kind for token, kind in zip(tokens, kinds, strict=False)
    ]
    return Vocabulary(list(tokens), kinds)


def token_with_role(metadata: Mapping[str, Any], role: str, size: int) -> int | None:
    """The token that ``tokenizer.ggml.ROLE_token_id`` names, or ``None``.

    Args:
        metadata: the file's values, by key.
        role: such as ``eos``.
        size: of the vocabulary.

    Raises:
        ValueError: the vocabulary has no such token.
    """
    key = f"tokenizer.ggml.{role}_token_id"
    token = metadata.get(key)
    if token is None or token in _NO_TOKEN:
        return None
    return _checked(key, token, size)


def listed_ends(metadata: Mapping[str, Any], size: int) -> list[int]:
    """Further tokens that end generation, in Ollama's key for models that have several.

    Args:
        metadata: the file's values, by key.
        size: of the vocabulary.

    Raises:
        ValueError: the vocabulary has no such token.
    """
    key = "tokenizer.ggml.eos_token_ids"
    return [_checked(key, token, size) for token in metadata.get(key) or []]


def _checked(key: str, token: Any, size: int) -> int:
    if not isinstance(token, int) or not 0 <= token < size:
        raise ValueError(f"its {key} is {quoted(token)}; its vocabulary has the tokens 0 to {size - 1}")
    return token
