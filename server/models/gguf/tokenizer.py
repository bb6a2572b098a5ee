"""The tokenizer that a GGUF file describes, put together from its own vocabulary.

transformers' own conversion depends on its version, and no version honors all that the file says.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from gguf import TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models

from server.errors import quoted
from server.models.gguf.cuts import Cut, cut_named
from server.models.tokenizing.frame import frame
from server.models.tokenizing.sentencepiece import Spaces, merged, scored
from server.models.tokenizing.vocabulary import Vocabulary, has_vocabulary, read_vocabulary, token_with_role

_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}

# Roles for which Ollama's converter says, too, that their token is not added to texts.
_NEVER_ADDED = ("unknown", "padding", "seperator", "cls", "mask")

# Keys that say nothing about how text becomes tokens and back, and why.
_SAYS_NOTHING = {
    "tokenizer.ggml.scores": "byte-level vocabularies merge by their list of merges",
    "tokenizer.ggml.merges": "SentencePiece vocabularies merge by their scores",
    "tokenizer.ggml.pre": "SentencePiece vocabularies cut no words",
    "tokenizer.ggml.token_type_count": "segments of encoders",
    "tokenizer.ggml.cls_token_id": "a role in encoders",
    "tokenizer.ggml.mask_token_id": "a role in training",
    "tokenizer.ggml.seperator_token_id": "used where add_sep_token is set, which is refused",
    "tokenizer.ggml.fim_pre_token_id": "a role in the prompts of editors, which send the token themselves",
    "tokenizer.ggml.fim_suf_token_id": "likewise",
    "tokenizer.ggml.fim_mid_token_id": "likewise",
    "tokenizer.ggml.fim_pad_token_id": "likewise",
    "tokenizer.ggml.fim_rep_token_id": "likewise",
    "tokenizer.ggml.fim_sep_token_id": "likewise",
    "tokenizer.ggml.prefix_token_id": "likewise, by an older name",
    "tokenizer.ggml.suffix_token_id": "likewise",
    "tokenizer.ggml.middle_token_id": "likewise",
    "tokenizer.ggml.normalizer.lowercase": "for WordPiece vocabularies, which are refused",
    "tokenizer.ggml.normalizer.strip_accents": "likewise",
    "tokenizer.huggingface.json": "the same tokenizer in another form",
}


def read_tokenizer(file: Path, metadata: Mapping[str, Any]) -> Any:
    """A fast tokenizer of transformers, chat templates included; ``None`` where the file says it has none.

    Args:
        file: the GGUF file.
        metadata: its values, by key.

    Raises:
        ValueError: how the vocabulary turns text into tokens is not known, or the file contradicts itself.
    """
    for key in _SAYS_NOTHING:
        metadata.get(key)
    if not has_vocabulary(metadata):
        return None
    model = metadata.get("tokenizer.ggml.model")
    if model not in _KINDS:
        raise ValueError(
            f"its kind of tokenizer (tokenizer.ggml.model {quoted(model)}) is none of {', '.join(_KINDS)}"
        )
    vocabulary = read_vocabulary(metadata)
    backend, adds_bos = _KINDS[model](metadata, vocabulary)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    tokens, kinds = vocabulary
    for role, key in _ROLES.items():
        token = token_with_role(metadata, key, len(tokens))
        # A token with a role is special, which a word of the vocabulary must not become only to fill up rows.
        if token is not None and (key in ("bos", "eos") or kinds[token] != TokenType.NORMAL):
            setattr(tokenizer, role, tokens[token])
    _frame(tokenizer, metadata, adds_bos)
    tokenizer.chat_template = _templates(metadata)
    return tokenizer


def _byte_level(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> tuple[Tokenizer, bool]:
    cut: Cut = cut_named(metadata.get("tokenizer.ggml.pre"))
    _refuse_sentencepiece_keys(metadata)
    merges = _merges(metadata)
    tokenizer = Tokenizer(
        models.BPE(vocab=_with_text(vocabulary, merges), merges=merges, ignore_merges=cut.whole_words)
    )
    if (normalizer := cut.normalizer()) is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = cut.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    special = vocabulary.of_kind(TokenType.CONTROL, TokenType.UNKNOWN)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    defined = vocabulary.of_kind(TokenType.USER_DEFINED)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in defined])
    return tokenizer, cut.begins


def _sentencepiece(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> tuple[Tokenizer, bool]:
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) < len(vocabulary.tokens):
        raise ValueError(
            "its vocabulary has no scores (tokenizer.ggml.scores), by which its tokens are merged"
        )
    spaces = Spaces(
        prefix=bool(metadata.get("tokenizer.ggml.add_space_prefix", True)),
        collapse=bool(metadata.get("tokenizer.ggml.remove_extra_whitespaces", False)),
        charsmap=bytes(each % 256 for each in metadata.get("tokenizer.ggml.precompiled_charsmap") or ()),
        # Phi-3's are so, which the file has no key for; llama.cpp knows it by the model.
        eaten=metadata.get("general.architecture") == "phi3",
    )
    return scored(vocabulary, scores, _unknown(metadata, vocabulary), spaces), True


def _gemma4(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> tuple[Tokenizer, bool]:
    _refuse_sentencepiece_keys(metadata)
    return merged(vocabulary, _merges(metadata), _unknown(metadata, vocabulary)), True


_KINDS = {"gpt2": _byte_level, "llama": _sentencepiece, "gemma4": _gemma4}


def _unknown(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> int | None:
    unknown = token_with_role(metadata, "unknown", len(vocabulary.tokens))
    if unknown is None:
        return next(iter(vocabulary.of_kind(TokenType.UNKNOWN).values()), None)
    return unknown


def _refuse_sentencepiece_keys(metadata: Mapping[str, Any]) -> None:
    """Refuses keys that only SentencePiece vocabularies are known to have."""
    for key in ("add_space_prefix", "precompiled_charsmap", "remove_extra_whitespaces"):
        if metadata.get(f"tokenizer.ggml.{key}"):
            raise ValueError(
                f"it has tokenizer.ggml.{key}, which Longspan does not know for its kind of tokenizer"
            )


def _merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges = metadata.get("tokenizer.ggml.merges")
    if merges is None:
        raise ValueError("its vocabulary has no merges (tokenizer.ggml.merges); use a newer file")
    cuts = [merge.find(" ", 1) for merge in merges]
    if min(cuts, default=1) < 0:
        raise ValueError(f"its merge {quoted(merges[cuts.index(-1)])} does not name two tokens")
    return [(merge[:cut], merge[cut + 1 :]) for merge, cut in zip(merges, cuts, strict=True)]


def _with_text(vocabulary: Vocabulary, merges: list[tuple[str, str]]) -> dict[str, int]:
    """The vocabulary without tokens that only fill it up, which are no text where a model samples one."""
    needed = {part for merge in merges for part in (*merge, "".join(merge))}
    unused = vocabulary.of_kind(TokenType.UNUSED)
    return {
        token: index
        for index, token in enumerate(vocabulary.tokens)
        if token and (token not in unused or token in needed)
    }


def _frame(tokenizer: Any, metadata: Mapping[str, Any], adds_bos: bool) -> None:
    """Makes texts begin and end with the tokens that the file says."""
    if metadata.get("tokenizer.ggml.add_sep_token"):
        raise ValueError("it puts separators between texts (tokenizer.ggml.add_sep_token), as encoders do")
    for role in _NEVER_ADDED:
        if metadata.get(f"tokenizer.ggml.add_{role}_token"):
            raise ValueError(f"where it adds a token to texts (tokenizer.ggml.add_{role}_token) is unknown")
    wanted = {
        "bos": metadata.get("tokenizer.ggml.add_bos_token", None),
        "eos": metadata.get("tokenizer.ggml.add_eos_token", False),
    }
    for role, wants in wanted.items():
        if wants and getattr(tokenizer, f"{role}_token") is None:
            raise ValueError(f"it asks for a token (tokenizer.ggml.add_{role}_token) that it does not name")
    begins = adds_bos if wanted["bos"] is None else wanted["bos"]
    frame(tokenizer, bos=bool(begins), eos=bool(wanted["eos"]))


def _templates(metadata: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The chat template, or several by their names, as transformers keeps them."""
    default: str | None = metadata.get("tokenizer.chat_template")
    names: list[str] = metadata.get("tokenizer.chat_templates") or []
    if not names:
        return default
    templates = {} if default is None else {"default": default}
    for name in names:
        template = metadata.get(f"tokenizer.chat_template.{name}")
        if template is None:
            raise ValueError(f"it lists a chat template {quoted(name)} that it does not have")
        templates[name] = template
    return templates
