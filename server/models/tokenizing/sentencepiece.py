"""Tokenizers whose vocabulary SentencePiece made, from a GGUF file or from its own.

Those of the kind BPE join neighboring characters, then tokens, in the order of the scores of what comes out.
The tokenizers library does the same by a list of merges, which is derived from the scores.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from server.errors import quoted
from server.models.tokenizing.vocabulary import Vocabulary

_SPACE = "\u2581"
_ALL = 1 << 16
# SentencePiece's own score for tokens that its user defined, by which they compete with the others.
_DEFINED = -0.1
_NORMAL = (TokenType.NORMAL, 0)


class Spaces(NamedTuple):
    """The treatment of spaces, and of characters before they are tokens.

    Attributes:
        prefix: a space is put before a text, and before what follows a control token, as llama.cpp does.
            A token that the user of SentencePiece defined is text and is followed by none.
        collapse: of several spaces only one is kept, at either end of a text none.
        charsmap: SentencePiece's table of characters to replace; may be empty.
        eaten: those that follow a control token are dropped.
        first: with ``prefix``, only the beginning of the whole text has one, as in transformers' tokenizers
            that are not ``legacy``.
    """

    prefix: bool
    collapse: bool = False
    charsmap: bytes = b""
    eaten: bool = False
    first: bool = False


def scored(vocabulary: Vocabulary, scores: list[float], unknown: int | None, spaces: Spaces) -> Tokenizer:
    """A tokenizer that merges by scores.

    Args:
        vocabulary: of the file.
        scores: one per token.
        unknown: the token of characters that the vocabulary has no token for, where it has no bytes.
        spaces: how they are treated.

    Raises:
        ValueError: SentencePiece would give texts other tokens.
    """
    return _bpe(vocabulary, _merges(vocabulary.of_kind(*_NORMAL), scores), unknown, spaces)


def merged(vocabulary: Vocabulary, merges: list[tuple[str, str]], unknown: int | None) -> Tokenizer:
    """A tokenizer of the same form whose file does list its merges; no space is put before a text.

    Args:
        vocabulary: of the file.
        merges: in their order.
        unknown: as for ``scored``.
    """
    return _bpe(vocabulary, merges, unknown, Spaces(prefix=False))


def unigram(vocabulary: Vocabulary, scores: list[float], unknown: int, spaces: Spaces) -> Tokenizer:
    """A tokenizer that takes the most likely of all ways to cut a text.

    Args:
        vocabulary: of the model.
        scores: log probabilities of its tokens.
        unknown: as for ``scored``.
        spaces: how they are treated.
    """
    entries = list(zip(vocabulary.tokens, scores, strict=True))
    never = 10 * min(scores) - 1000
    for token, index in vocabulary.of_kind(TokenType.BYTE, TokenType.UNUSED).items():
        entries[index] = (token, never)  # a text that spells one is not that token
    for token, index in _defined(vocabulary).items():
        entries[index] = (token, _DEFINED)
    byte_fallback = bool(vocabulary.of_kind(TokenType.BYTE))
    return _finish(Tokenizer(models.Unigram(entries, unknown, byte_fallback)), vocabulary, {}, spaces)


def _merges(normal: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, the best score first.

    Of two pairs that make the same token, the one with the longer first half comes first: in a text it is
    the one further left.

    Raises:
        ValueError: SentencePiece would join characters that are no tokens, from which no merge can begin.
    """
    for token in normal:
        if lost := [letter for letter in token if letter not in normal]:
            raise ValueError(
                f"SentencePiece makes its token {quoted(token)} of characters of which {lost[0]!r} is no "
                "token, which Longspan can't"
            )
    found = [
        (-scores[index], index, -cut, token[:cut], token[cut:])
        for token, index in normal.items()
        for cut in range(1, len(token))
        if token[:cut] in normal and token[cut:] in normal
    ]
    return [(left, right) for *_, left, right in sorted(found)]


def _defined(vocabulary: Vocabulary) -> dict[str, int]:
    return {
        token.replace(" ", _SPACE): index
        for token, index in vocabulary.of_kind(TokenType.USER_DEFINED).items()
    }


def _late(defined: dict[str, int], spaces: Spaces) -> bool:
    """Whether tokens that the user defined are cut out after all else that is done to a text.

    The library would do all of it to the token, and to what follows as if a text began there.
    """
    return bool(defined) and (spaces.prefix or spaces.collapse or bool(spaces.charsmap)) and not spaces.first


def _bpe(
    vocabulary: Vocabulary, merges: list[tuple[str, str]], unknown: int | None, spaces: Spaces
) -> Tokenizer:
    defined = _defined(vocabulary)
    byte_tokens = vocabulary.of_kind(TokenType.BYTE)
    special = vocabulary.of_kind(TokenType.CONTROL, TokenType.UNKNOWN)
    model = models.BPE(
        vocab={**vocabulary.of_kind(*_NORMAL), **byte_tokens, **special, **defined},
        merges=merges,
        unk_token=None if unknown is None else vocabulary.tokens[unknown],
        fuse_unk=True,
        byte_fallback=bool(byte_tokens),
        ignore_merges=_late(defined, spaces),
    )
    return _finish(Tokenizer(model), vocabulary, defined, spaces)


def _finish(
    tokenizer: Tokenizer, vocabulary: Vocabulary, defined: dict[str, int], spaces: Spaces
) -> Tokenizer:
    """The processing of a text before and after, and the tokens that are cut out of it."""
    tokenizer.normalizer = _normalizer(spaces)
    if _late(defined, spaces):
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_any_of(list(defined))), behavior="isolated"),
                # A word that spells a byte's token is not that token.
                pre_tokenizers.Split(Regex("^<(?=0x[0-9A-F]{2}>$)"), behavior="isolated"),
            ]
        )
    else:
        if spaces.prefix and spaces.first:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, "first", split=False)
        tokenizer.add_tokens([AddedToken(token, normalized=True) for token in defined])
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True, rstrip=spaces.eaten and _eats(token))
            for token in vocabulary.of_kind(TokenType.CONTROL, TokenType.UNKNOWN)
        ]
    )
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spaces.prefix or spaces.collapse:
        steps.append(decoders.Strip(" ", _ALL if spaces.collapse else 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _normalizer(spaces: Spaces) -> Any:
    steps: list[Any] = []
    if spaces.charsmap:
        steps.append(normalizers.Precompiled(spaces.charsmap))
    if spaces.collapse:
        steps.append(normalizers.Replace(Regex(r"\A +|(?<= ) +"), ""))
    steps.append(normalizers.Replace(" ", _SPACE))
    if spaces.collapse:
        steps.append(normalizers.Replace(Regex(rf"{_SPACE}+\z"), ""))
    if spaces.prefix and not spaces.first:
        steps.append(normalizers.Prepend(_SPACE))
    return normalizers.Sequence(steps)


def _eats(token: str) -> bool:
    return token not in ("<unk>", "<s>", "<|endoftext|>")


def _any_of(tokens: list[str]) -> str:
    """A pattern of all these words, the longest first; what no word begins with is ruled out at once."""
    words = "|".join(_literal(token) for token in sorted(tokens, key=len, reverse=True))
    return f"(?=[{''.join(sorted({_literal(token[0]) for token in tokens}))}])(?:{words})"


def _literal(text: str) -> str:
    """The text as a pattern, in hexadecimal, so that nothing in it has a meaning."""
    return "".join(f"\\x{{{ord(character):x}}}" for character in text)
