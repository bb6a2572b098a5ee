"""A model's ``tokenizer.model`` of SentencePiece, read as SentencePiece reads it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Tokenizer, decoders

from server.errors import quoted
from server.models.json_file import read_object
from server.models.tokenizing.numbering import FOREIGN, Numbering
from server.models.tokenizing.sentencepiece import Spaces, scored, unigram
from server.models.tokenizing.vocabulary import Vocabulary

# SentencePiece's own names for its kinds of models.
_UNIGRAM, _BPE = 1, 2
# Four times as many as any model has, and their bytes.
_MOST_PIECES, _MOST_BYTES = 2**20, 2**26


class NotSentencePieceError(ValueError):
    """A file is none of SentencePiece's."""


def parse_model(file: Path) -> Any:
    """The file as SentencePiece's message.

    Raises:
        NotSentencePieceError: it is none of SentencePiece's.
        ValueError: it is damaged, or larger than any model.
    """
    # transformers' copy: that of the package sentencepiece wants a newer protobuf than gRPC may bring.
    from transformers.utils import sentencepiece_model_pb2_new as proto

    if (size := file.stat().st_size) > _MOST_BYTES:
        raise ValueError(f"{file.name} has {size >> 20} MiB; more than {_MOST_BYTES >> 20} are not read")
    model = proto.ModelProto()
    try:
        model.ParseFromString(file.read_bytes())
    except Exception as error:  # protobuf's own, which differ between its versions
        raise NotSentencePieceError(f"{file.name} is no SentencePiece model, or not all of it") from error
    if not model.pieces:
        raise NotSentencePieceError(f"{file.name} is no SentencePiece model, or not all of it")
    if (count := len(model.pieces)) > _MOST_PIECES:
        raise ValueError(f"{file.name} has {count} tokens; more than {_MOST_PIECES} are not read")
    if not (model.HasField("trainer_spec") and model.HasField("normalizer_spec")):
        raise ValueError(f"{file.name} ends before it says how it treats texts; fetch it again")
    if all(piece.type != TokenType.UNKNOWN for piece in model.pieces):
        raise ValueError(f"{file.name} has no token for what it does not know; fetch it again")
    if unusual := [piece.piece for piece in model.pieces if not math.isfinite(piece.score)]:
        raise ValueError(f"{file.name} gives its token {quoted(unusual[0])} a score that is NaN or infinite")
    return model


def build_tokenizer(model: Any, *, legacy: bool, numbered: Numbering | None = None) -> Tokenizer:
    """The tokenizer of a parsed model.

    Args:
        model: of ``parse_model``.
        legacy: as transformers means it: a space is put before what follows a control token, too.
        numbered: the model's own ids; without it they are SentencePiece's.

    Raises:
        ValueError: the model is of a kind that is not supported.
    """
    normalizer, trainer = model.normalizer_spec, model.trainer_spec
    if not normalizer.escape_whitespaces or trainer.treat_whitespace_as_suffix:
        raise ValueError("its SentencePiece model treats spaces in an unusual way")
    if numbered is None:
        vocabulary = Vocabulary(
            [piece.piece for piece in model.pieces], [piece.type for piece in model.pieces]
        )
        scores = [piece.score for piece in model.pieces]
    else:
        vocabulary, scores = numbered.vocabulary, numbered.scores
    foreign = any(token.startswith(FOREIGN) for token in vocabulary.tokens)
    unknown = vocabulary.kinds.index(TokenType.UNKNOWN)
    spaces = Spaces(
        prefix=normalizer.add_dummy_prefix,
        collapse=normalizer.remove_extra_whitespaces,
        charsmap=normalizer.precompiled_charsmap,
        first=not legacy,
    )
    if trainer.model_type == _BPE and not foreign:
        return scored(vocabulary, scores, unknown, spaces)
    if trainer.model_type == _BPE:
        raise ValueError("its SentencePiece model is BPE, and the target has tokens of its own")
    if trainer.model_type == _UNIGRAM:
        tokenizer = unigram(vocabulary, scores, unknown, spaces)
        if foreign:
            tokenizer.decoder = decoders.Sequence([decoders.Replace(FOREIGN, ""), tokenizer.decoder])
        return tokenizer
    raise ValueError("its SentencePiece model is neither BPE nor unigram")


def add_tokens(tokenizer: Tokenizer, folder: Path, config: dict[str, Any]) -> None:
    """Adds the tokens that the model's folder names beside its SentencePiece model.

    Args:
        tokenizer: of ``build_tokenizer``.
        folder: of the model.
        config: its ``tokenizer_config.json``.

    Raises:
        ValueError: one has another id than it should.
    """
    wanted: dict[int, AddedToken] = {}
    file = folder / "added_tokens.json"
    if file.is_file():
        for text, index in read_object(file).items():
            if type(index) is not int:
                raise ValueError(f"{file.name}: the id of {quoted(text)} is {quoted(index)}, no whole number")
            wanted[index] = AddedToken(text, normalized=False)
    listed = config.get("added_tokens_decoder") or {}
    if not isinstance(listed, dict):
        raise ValueError("tokenizer_config.json: added_tokens_decoder is no object")
    for index, said in listed.items():
        if not index.isdecimal() or not isinstance(said, dict) or not isinstance(said.get("content"), str):
            raise ValueError(
                f"tokenizer_config.json: added_tokens_decoder: {quoted(index)} is no id with a token's "
                "content"
            )
        wanted[int(index)] = AddedToken(
            said["content"],
            **{name: bool(said.get(name, False)) for name in ("lstrip", "rstrip", "single_word", "special")},
            normalized=False,
        )
    for index, token in sorted(wanted.items()):
        add = tokenizer.add_special_tokens if token.special else tokenizer.add_tokens
        add([token])
        if (found := tokenizer.token_to_id(token.content)) != index:
            raise ValueError(
                f"its added token {quoted(token.content)} should have the id {index}, not {found}"
            )
