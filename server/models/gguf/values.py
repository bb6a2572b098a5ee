"""The kinds of values that keys must have, and how large they must be at least.

llama.cpp refuses a key of another type than it expects. Here the text "false" would be taken for true, and
absurd numbers would be found out late or never.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from server.errors import quoted
from server.models.gguf.file import GgufFile


class _Kind(NamedTuple):
    """A kind of values.

    Attributes:
        name: for people.
        fits: whether a value is of this kind.
        many: the value is a list of such; where it is not said, a list has one value for each layer.
    """

    name: str
    fits: Callable[[Any], bool]
    many: bool = False


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


# Lengths beyond are no model's, and overflow where they are computed with.
_LARGEST = (1 << 31) - 1
_TEXT = _Kind("a text", lambda value: isinstance(value, str))
_TEXTS = _TEXT._replace(many=True)
_FLAG = _Kind("true or false", lambda value: value in (0, 1) and not isinstance(value, float))
_WHOLE = _Kind("a whole number", _is_whole)
_SIZE = _Kind("a whole number of at least 0", lambda value: _is_whole(value) and 0 <= value <= _LARGEST)
_COUNT = _Kind("a whole number of at least 1", lambda value: _is_whole(value) and 1 <= value <= _LARGEST)
_NUMBER = _Kind("a finite number", _is_number)
_NOT_NEGATIVE = _Kind("a finite number of at least 0", lambda value: _is_number(value) and value >= 0)
_POSITIVE = _Kind("a finite number above 0", lambda value: _is_number(value) and value > 0)
_NUMBERS = _Kind("a number", lambda value: isinstance(value, int | float), many=True)

_PATTERN = _Kind("a whole number of at least 0, or true or false for each layer", _SIZE.fits)

# By patterns of keys, the first that fits; ``{a}`` stands for the architecture's name.
_KINDS = {
    r"tokenizer\.ggml\.(add_.+_token|add_space_prefix|remove_extra_whitespaces)": _FLAG,
    r"{a}\.(use_parallel_residual|attention\.causal|expert_weights_norm|rope\.scaling\.finetuned)": _FLAG,
    r"tokenizer\.ggml\.(model|pre)|tokenizer\.chat_template(\..+)?|{a}\.rope\.scaling\.type": _TEXT,
    r"tokenizer\.ggml\.(tokens|merges)|tokenizer\.chat_templates": _TEXTS,
    r"tokenizer\.ggml\.(token_type|suppress_tokens|eos_token_ids)": _WHOLE._replace(many=True),
    r"tokenizer\.ggml\.scores": _NUMBERS,
    r"tokenizer\.ggml\..+_token_id": _WHOLE,
    r"general\.sampling\.(temp|top_.|min_p|penalty_.+|xtc_.+|mirostat.*)": _NUMBER,
    r"{a}\.attention\.sliding_window_pattern": _PATTERN,
    r"{a}\.(block_count|context_length|embedding_length|attention\.head_count(_kv)?)": _COUNT,
    r"{a}\.(attention\.(key|value)_length(_swa)?|rope\.scaling\.original_context_length)": _COUNT,
    r"{a}\.(.+_(length|count)|attention\.sliding_window|expert_gating_func)": _SIZE,
    r"{a}\.rope\.freq_base(_swa)?": _POSITIVE,
    r"{a}\.(attention\.layer_norm(_rms)?_epsilon|rope\.scaling\.factor|rope\.scale_linear)": _NOT_NEGATIVE,
    r"{a}\.(rope\.scaling\..+|attention\.(scale|temperature_scale))": _NUMBER,
    r"{a}\.(.+_softcapping|embedding_scale|residual_scale|logit_scale|expert_weights_scale)": _NUMBER,
}


def check_values(file: GgufFile, architecture: str) -> None:
    """Refuses values that no computation could take as they are.

    Args:
        file: whose keys are checked; that says nothing of whether they are used.
        architecture: as the file calls it.

    Raises:
        ValueError: a value is of another kind, or too small; the message names its key.
    """
    patterns = [
        (re.compile(pattern.replace("{a}", re.escape(architecture))), kind)
        for pattern, kind in _KINDS.items()
    ]
    for key in file.metadata:
        kind = next((kind for pattern, kind in patterns if pattern.fullmatch(key)), None)
        if kind is None:
            continue
        value = file.metadata.peek(key)
        if not _fits(kind, value):
            kinds = f"a list, each of {kind.name}" if kind.many else kind.name
            raise ValueError(f"its {key} is {quoted(value)}; it must be {kinds}")


def _fits(kind: _Kind, value: Any) -> bool:
    if kind.many:
        return isinstance(value, list) and all(map(kind.fits, value))
    if not isinstance(value, list):
        return kind.fits(value)
    if kind is _PATTERN:
        return bool(value) and all(map(_FLAG.fits, value))
    if len(set(value)) == 1:
        return kind.fits(value[0])
    # The reader of the key decides whether layers may differ in it.
    return bool(value) and kind is not _TEXT and kind is not _FLAG and all(map(_is_number, value))
