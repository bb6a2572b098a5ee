"""The tokenizer that a GGUF file describes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

# How text is cut before merging, by the names that llama.cpp gives (its file llama-vocab.cpp is the source).
_CASES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CAMEL = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_WORDS = rf"{_CASES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_MARKS = r" ?[^\s\p{L}\p{N}]+"
_PATTERNS = {
    "llama3": rf"{_WORDS}|\p{{N}}{{1,3}}|{_MARKS}[\r\n]*|{_TAIL}",
    "qwen2": rf"{_WORDS}|\p{{N}}|{_MARKS}[\r\n]*|{_TAIL}",
    "tekken": rf"{_CAMEL[0]}|{_CAMEL[1]}|\p{{N}}|{_MARKS}[\r\n/]*|{_TAIL}",
    "gpt-4o": rf"{_CAMEL[0]}{_CASES}?|{_CAMEL[1]}{_CASES}?|\p{{N}}{{1,3}}|{_MARKS}[\r\n/]*|{_TAIL}",
}
_GROUPS = {
    "gpt-2": ("gpt-2", "phi-2", "mpt", "olmo", "jais", "roberta-bpe", "trillion"),
    "digits": ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "llama3": ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "dbrx", "smaug-bpe"),
    "qwen2": ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"),
    "tekken": ("tekken",),
    "gpt-4o": ("gpt-4o", "llama4"),
}
_GROUP_OF = {name: group for group, names in _GROUPS.items() for name in names}
# A word that is in the vocabulary as a whole is one token there, whatever its merges say.
_WHOLE_WORDS = {"llama3", "tekken"}
# Texts begin with the beginning-of-sequence token there, unless the file says otherwise.
_BOS_BY_DEFAULT = {"llama3", "tekken"}

_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def read_tokenizer(file: Path, metadata: Mapping[str, Any]) -> Any:
    """A fast tokenizer of transformers, chat template included.

    Byte-level vocabularies are put together here: what transformers makes of them depends on its version,
    and none cuts numbers as SmolLM does. Others are transformers' own.

    Args:
        file: the GGUF file.
        metadata: its values, by key.

    Raises:
        ValueError: how the vocabulary cuts text is not known.
    """
    byte_level = _get(metadata, "model") == "gpt2"
    if byte_level:
        group = _group(metadata)
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=_byte_level(metadata, group))
        adds_bos = group in _BOS_BY_DEFAULT
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        adds_bos = _get(metadata, "model") == "llama"
    tokens = _get(metadata, "tokens")
    for role, key in _ROLES.items():
        token = _get(metadata, f"{key}_token_id")
        setattr(tokenizer, role, None if token is None else tokens[token])
    adds_bos = _get(metadata, "add_bos_token", adds_bos) and tokenizer.bos_token is not None
    adds_eos = _get(metadata, "add_eos_token", False) and tokenizer.eos_token is not None
    _frame(tokenizer, tokenizer.bos_token if adds_bos else None, tokenizer.eos_token if adds_eos else None)
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    return tokenizer


def _group(metadata: Mapping[str, Any]) -> str:
    name = _get(metadata, "pre")
    if name in _GROUP_OF:
        return _GROUP_OF[name]
    if name is None:
        raise ValueError("it does not say how its tokenizer cuts text (tokenizer.ggml.pre); use a newer file")
    raise ValueError(f"how its tokenizer cuts text ({name}) is unknown to Longspan")


def _byte_level(metadata: Mapping[str, Any], group: str) -> Tokenizer:
    tokens: list[str] = _get(metadata, "tokens")
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in _get(metadata, "merges")],
            ignore_merges=group in _WHOLE_WORDS,
        )
    )
    if group == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    if pattern := _PATTERNS.get(group):
        cut: Any = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        steps = [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    else:
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        if group == "digits":
            steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = _get(metadata, "token_type", [])
    for kind, special in ((TokenType.CONTROL, True), (TokenType.USER_DEFINED, False)):
        added = [
            AddedToken(token, normalized=False, special=special)
            for token, own in zip(tokens, kinds, strict=False)
            if own == kind
        ]
        if special:
            tokenizer.add_special_tokens(added)
        else:
            tokenizer.add_tokens(added)
    return tokenizer


def _frame(tokenizer: Any, bos: str | None, eos: str | None) -> None:
    """Makes texts begin with ``bos`` and end with ``eos``."""
    begin, end = [bos] if bos else [], [eos] if eos else []
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=[*begin, "$A:0", *end],
        pair=[*begin, "$A:0", *end, *begin, "$B:1", *end],
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in {*begin, *end}],
    )


def _get(metadata: Mapping[str, Any], key: str, default: Any = None) -> Any:
    return metadata.get(f"tokenizer.ggml.{key}", default)
