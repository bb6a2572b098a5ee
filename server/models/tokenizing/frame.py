"""The tokens with which texts begin and end."""

from __future__ import annotations

from typing import Any

from tokenizers import processors


def frame(tokenizer: Any, *, bos: bool, eos: bool) -> None:
    """Puts a tokenizer's own tokens around every text, and around both texts of a pair.

    Args:
        tokenizer: a fast tokenizer of transformers.
        bos: texts begin with its beginning-of-sequence token, if it has one.
        eos: they end with its end-of-sequence token, if it has one.
    """
    begin = [tokenizer.bos_token] if bos and tokenizer.bos_token else []
    end = [tokenizer.eos_token] if eos and tokenizer.eos_token else []
    enclose(tokenizer, begin, end)


def enclose(tokenizer: Any, begin: list[str], end: list[str]) -> None:
    """Puts tokens around every text, and around both texts of a pair.

    Args:
        tokenizer: a fast tokenizer of transformers.
        begin: tokens before a text.
        end: tokens behind it.
    """
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=[*begin, "$A:0", *end],
        pair=[*begin, "$A:0", *end, *begin, "$B:1", *end],
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in {*begin, *end}],
    )
