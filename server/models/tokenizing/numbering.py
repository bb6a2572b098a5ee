"""How encoder-decoders number the tokens of their SentencePiece models, as transformers' classes do."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gguf import TokenType

from server.errors import quoted
from server.models.json_file import read_object
from server.models.tokenizing.vocabulary import Vocabulary

FOREIGN = "\U0010fffc"
"""Begins the entry of a token of the target alone, so that no source has it. Decoding takes it away."""
_MADE_UP = 8  # M2M100's model has as many tokens behind its languages
_MOST_ADDED = 2**16  # far more than any model has


class Numbering(NamedTuple):
    """A vocabulary by the model's ids.

    Attributes:
        vocabulary: tokens and their kinds.
        scores: of each, 0 where SentencePiece has none.
        number: the ids of SentencePiece's own ids.
        begin: tokens that are put before a text.
        end: tokens that are put behind it.
        roles: such as ``eos_token``, where the folder does not name it.
    """

    vocabulary: Vocabulary
    scores: list[float]
    number: list[int]
    begin: list[str]
    end: list[str]
    roles: dict[str, str | None]


class _Table:
    """Tokens as they get their ids, one after another."""

    def __init__(self, pieces: Sequence[Any]) -> None:
        self.pieces = pieces
        self.unknown = next(str(piece.piece) for piece in pieces if piece.type == TokenType.UNKNOWN)
        """SentencePiece's token for what it does not know."""
        self._no_text: dict[str, list[int]] = {}
        for index, piece in enumerate(pieces):
            if piece.type in (TokenType.UNKNOWN, TokenType.CONTROL):
                self._no_text.setdefault(piece.piece, []).append(index)
        self.tokens: list[str] = []
        self.kinds: list[int] = []
        self.scores: list[float] = []
        self._number: dict[int, int] = {}

    def special(self, *tokens: str) -> None:
        """Adds tokens that are no text; an unknown token of this spelling is SentencePiece's."""
        for token in tokens:
            self._number.update(dict.fromkeys(self._no_text.get(token, ()), len(self.tokens)))
            unknown = token == self.unknown
            self._add(token, TokenType.UNKNOWN if unknown else TokenType.CONTROL, 0.0)

    def piece(self, index: int) -> None:
        """Adds one of SentencePiece's."""
        self._number[index] = len(self.tokens)
        piece = self.pieces[index]
        self._add(piece.piece, piece.type, piece.score)

    def foreign(self, token: str) -> None:
        """Adds one that no source has, and that is text in a target."""
        self._add(f"{FOREIGN}{token}", TokenType.UNUSED, 0.0)

    def _add(self, token: str, kind: int, score: float) -> None:
        self.tokens.append(token)
        self.kinds.append(kind)
        self.scores.append(score)

    def done(self, begin: Sequence[str] = (), end: Sequence[str] = ("</s>",)) -> Numbering:
        """The numbering, with what frames a text."""
        unknown = self.tokens.index(self.unknown)
        number = [self._number.get(index, unknown) for index in range(len(self.pieces))]
        roles = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"))
        named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": self.unknown, "pad_token": "<pad>"}
        roles |= {role: token for role, token in named.items() if token in self.tokens}
        vocabulary = Vocabulary(self.tokens, self.kinds)
        return Numbering(vocabulary, self.scores, number, list(begin), list(end), roles)


def numbering(family: str, pieces: Sequence[Any], folder: Path, config: dict[str, Any]) -> Numbering:
    """The numbering of a family's model.

    Args:
        family: of ``family_of``.
        pieces: of SentencePiece's message.
        folder: of the model.
        config: its ``tokenizer_config.json``.

    Raises:
        ValueError: the files do not say it.
    """
    return _FAMILIES[family](_Table(pieces), folder, config)


def family_of(own: str | None, kind: str | None) -> str | None:
    """The family whose numbering a model has; ``None`` for one that is not known.

    Args:
        own: ``tokenizer_class``.
        kind: ``model_type`` of the config.
    """
    if own is not None:
        return _CLASSES.get(own.removesuffix("Fast"))
    return _KINDS.get(kind or "")


def _t5(table: _Table, folder: Path, config: dict[str, Any]) -> Numbering:
    for index in range(len(table.pieces)):
        table.piece(index)
    table.special(*(f"<extra_id_{index}>" for index in reversed(range(_count(config, "extra_ids", 100)))))
    return table.done()


def _pegasus(table: _Table, folder: Path, config: dict[str, Any]) -> Numbering:
    offset = _count(config, "offset", 103, least=2)
    table.special("<pad>", "</s>", "<mask_1>", "<mask_2>", *(f"<unk_{index}>" for index in range(2, offset)))
    for index in range(2, len(table.pieces)):
        table.piece(index)
    return table.done()


def _mbart(table: _Table, folder: Path, config: dict[str, Any]) -> Numbering:
    language = _fairseq(table, "mbart", config)
    return table.done(end=["</s>", language])


def _mbart50(table: _Table, folder: Path, config: dict[str, Any]) -> Numbering:
    language = _fairseq(table, "mbart50", config)
    return table.done(begin=[language])


def _fairseq(table: _Table, name: str, config: dict[str, Any]) -> str:
    table.special("<s>", "<pad>", "</s>", table.unknown)
    for index in range(3, len(table.pieces)):
        table.piece(index)
    languages = _languages(name)
    table.special(*languages, "<mask>")
    return _chosen(config, "en_XX", languages)


def _m2m_100(table: _Table, folder: Path, config: dict[str, Any]) -> Numbering:
    missing = _listed(table, folder)
    known = _languages("m2m_100")
    name = config.get("language_codes", "m2m100")
    if not isinstance(name, str) or name not in known:
        raise ValueError(
            f"tokenizer_config.json: language_codes is {quoted(name)}; it must be one of {', '.join(known)}"
        )
    codes = known[name]
    table.special(*(f"__{code}__" for code in codes))
    table.special(*(f"madeupword{index}" for index in range(_count(config, "num_madeup_words", _MADE_UP))))
    for index in missing:
        table.piece(index)
    return table.done(begin=[f"__{_chosen(config, 'en', codes)}__"])


def _marian(table: _Table, folder: Path, config: dict[str, Any]) -> Numbering:
    if config.get("separate_vocabs"):
        raise ValueError("they are a vocabulary for the source and another one for the target")
    for index in _listed(table, folder):
        table.piece(index)
    return table.done()


def _listed(table: _Table, folder: Path) -> list[int]:
    """Adds the tokens of ``vocab.json``; gives the pieces that it lacks.

    transformers makes the unknown token of these. Behind the model's own tokens they refuse a text that has
    one, which says more.
    """
    if not (folder / "vocab.json").is_file():
        raise ValueError("vocab.json, which numbers the tokens, is missing beside the SentencePiece model")
    listed = read_object(folder / "vocab.json")
    numbers = listed.values()
    if any(type(number) is not int for number in numbers) or sorted(numbers) != list(range(len(listed))):
        raise ValueError("vocab.json does not number its tokens from 0 on")
    if lacking := [token for token in (table.unknown, "</s>") if token not in listed]:
        raise ValueError(f"vocab.json lacks the token {quoted(lacking[0])}")
    pieces = {
        piece.piece: index
        for index, piece in enumerate(table.pieces)
        if piece.type not in (TokenType.CONTROL, TokenType.UNKNOWN)
    }
    for token in sorted(listed, key=listed.__getitem__):
        if token in pieces:
            table.piece(pieces[token])
        elif token in ("<s>", "</s>", "<pad>", table.unknown) or token.startswith(">>"):
            table.special(token)
        else:
            table.foreign(token)
    return [index for token, index in pieces.items() if token not in listed]


def _count(config: dict[str, Any], name: str, usual: int, least: int = 0) -> int:
    """A number of tokens.

    Raises:
        ValueError: it can be none.
    """
    value = config.get(name, usual)
    if type(value) is not int or not least <= value <= _MOST_ADDED:
        raise ValueError(
            f"tokenizer_config.json: {name} is {quoted(value)}; it must be a whole number from {least} to "
            f"{_MOST_ADDED}"
        )
    return value


def _languages(name: str) -> Any:
    module = importlib.import_module(f"transformers.models.{name}.tokenization_{name}")
    return module.FAIRSEQ_LANGUAGE_CODES


def _chosen(config: dict[str, Any], usual: str, known: Sequence[str]) -> str:
    language = config.get("src_lang") or usual
    if language not in known:
        raise ValueError(
            f"tokenizer_config.json names the language {quoted(language)}, which its class lacks"
        )
    return str(language)


_FAMILIES: dict[str, Callable[[_Table, Path, dict[str, Any]], Numbering]] = {
    "t5": _t5,
    "pegasus": _pegasus,
    "mbart": _mbart,
    "mbart50": _mbart50,
    "m2m_100": _m2m_100,
    "marian": _marian,
}
_CLASSES = {
    **dict.fromkeys(("T5Tokenizer", "MT5Tokenizer"), "t5"),
    "PegasusTokenizer": "pegasus",
    "MBartTokenizer": "mbart",
    "MBart50Tokenizer": "mbart50",
    "M2M100Tokenizer": "m2m_100",
    "MarianTokenizer": "marian",
}
# What transformers takes where tokenizer_config.json names no class.
_KINDS = {
    **dict.fromkeys(("t5", "mt5", "umt5", "longt5"), "t5"),
    "pegasus": "pegasus",
    "mbart": "mbart",
    "m2m_100": "m2m_100",
    "marian": "marian",
}
