"""How byte-level GGUF vocabularies cut text into words before merging, by ``tokenizer.ggml.pre``.

The names are llama.cpp's (its file llama-vocab.cpp lists them). A name stands for the pattern of the
tokenizer.json that llama.cpp derived it from: where llama.cpp approximates it, the original stands here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from tokenizers import Regex, normalizers, pre_tokenizers

_CASES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CAMEL = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_CAMEL_CASES = rf"{_CAMEL[0]}{_CASES}?|{_CAMEL[1]}{_CASES}?"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r" ?[^\s\p{L}\p{N}]+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CASES}|{_WORDS}|\p{{N}}{{1,3}}|{_MARKS}[\r\n]*|{_TAIL}"
_QWEN2 = rf"{_CASES}|{_WORDS}|\p{{N}}|{_MARKS}[\r\n]*|{_TAIL}"
_GPT_4O = rf"{_CAMEL_CASES}|\p{{N}}{{1,3}}|{_MARKS}[\r\n/]*|{_TAIL}"
_DIGIT = r"\p{N}"
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"  # noqa: RUF001 (other scripts' commas and full stops)
_HAN = r"[一-龥ࠀ-一가-퟿]+"
_HAN_KANA = r"[一-龥\x{3040}-\x{30FF}]+"
_ASCII_MARK = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
_WITH_MARKS = (
    rf"{_ASCII_MARK}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_TAIL}"
)


class Cut(NamedTuple):
    """One way to cut text.

    Attributes:
        patterns: applied one after the other; what matches and what lies between is cut apart.
        composes: text is brought into Unicode's composed form (NFC) first.
        whole_words: a word that is in the vocabulary as a whole is one token, whatever the merges say.
        begins: texts begin with the beginning-of-sequence token, unless the file says otherwise.
    """

    patterns: tuple[str, ...]
    composes: bool = False
    whole_words: bool = False
    begins: bool = False

    def normalizer(self) -> Any:
        """The normalizer of the tokenizers library, or ``None``."""
        return normalizers.NFC() if self.composes else None

    def pre_tokenizer(self) -> Any:
        """The cut as the tokenizers library's, bytes to letters included."""
        splits: list[Any] = [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in self.patterns
        ]
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([*splits, letters])


_CUTS: dict[tuple[str, ...], Cut] = {
    (
        *("gpt-2", "phi-2", "jais", "trillion", "granite-docling", "gigachat", "a.x-4.0", "mellum"),
        "exaone4",
    ): Cut((_GPT2,)),
    ("mpt", "olmo", "gpt-neox"): Cut((_GPT2,), composes=True),
    ("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b", "mellum2"): Cut((_DIGIT, _GPT2)),
    ("command-r",): Cut((_DIGIT, _GPT2), composes=True),
    (*("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),): Cut(
        (_LLAMA3,), whole_words=True, begins=True
    ),
    ("dbrx", "smaug-bpe", "chatglm-bpe"): Cut((_LLAMA3,)),
    ("glm4", "glm5"): Cut((_LLAMA3,), whole_words=True),
    ("minicpm5",): Cut(
        (r"\p{N}{1,3}", rf"{_CASES}|{_WORDS}|\p{{N}}+|{_MARKS}[\r\n]*|{_TAIL}"), whole_words=True
    ),
    ("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "kormo"): Cut((_QWEN2,), composes=True),
    ("hunyuan", "solar-open", "grok-2"): Cut((_QWEN2,)),
    ("qwen35",): Cut(
        (
            rf"{_CASES}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_TAIL}",
        ),
        composes=True,
    ),
    ("tekken",): Cut(
        (rf"{_CAMEL[0]}|{_CAMEL[1]}|\p{{N}}|{_MARKS}[\r\n/]*|{_TAIL}",), whole_words=True, begins=True
    ),
    ("gpt-4o", "llama4", "kanana2", "minimax-m2"): Cut((_GPT_4O,)),
    ("tiny_aya", "cohere2moe"): Cut((r"\d{1,3}(?=(?:\d{3})*\b)", _GPT_4O)),
    ("falcon",): Cut((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    ("deepseek-llm",): Cut(
        (
            r"[\r\n]",
            r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
            r"\s?[!-/:-~！-／：-～‘-‟　-。]+",  # noqa: RUF001 (ranges of full-width marks)
            r"\s+$",
            _HAN,
            r"\p{N}",
        )
    ),
    ("deepseek-coder",): Cut((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, _DIGIT)),
    ("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"): Cut((r"\p{N}{1,3}", _HAN_KANA, _WITH_MARKS)),
    ("poro-chat", "bloom", "gpt3-finnish"): Cut((_BLOOM,)),
    ("viking",): Cut((_BLOOM, _DIGIT)),
    ("bailingmoe", "bailingmoe2", "llada-moe"): Cut(
        (
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
            r"|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    ("seed-coder",): Cut((rf"{_CASES}|{_WORDS}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_TAIL}",)),
    ("exaone-moe",): Cut(
        (
            rf"{_CASES}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
            rf"|{_MARKS}[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
}
_CUT_OF = {name: cut for names, cut in _CUTS.items() for name in names}


def cut_named(name: str | None) -> Cut:
    """The cut of this name.

    Args:
        name: ``tokenizer.ggml.pre``, or ``None`` where the file has none.

    Raises:
        ValueError: it is not known.
    """
    if name in _CUT_OF:
        return _CUT_OF[name]
    if name in (None, "", "default"):
        raise ValueError("it does not say how its tokenizer cuts text (tokenizer.ggml.pre); use a newer file")
    raise ValueError(f"how its tokenizer cuts text ({name}) is unknown to Longspan")
