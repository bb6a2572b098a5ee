"""How an encoder-decoder's target begins and ends, and what it may not hold, as its makers say."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.encoder_messages import EncoderDecoderInfo
from server.errors import RefusedError, quoted

log = logging.getLogger("longspan.models")

USED = frozenset(
    {
        *("forced_bos_token_id", "forced_eos_token_id", "max_length", "max_new_tokens"),
        *("min_length", "min_new_tokens", "no_repeat_ngram_size", "suppress_tokens"),
    }
)
"""Fields of ``generation_config.json`` that count for encoder-decoders alone."""
_MOST_NGRAM = 64


@dataclass(frozen=True, slots=True)
class Target:
    """The behavior of transformers' ``generate`` towards a target where a request says nothing else.

    Attributes:
        info: lengths of source and target.
        start: tokens that the decoder begins with, which are not output.
        forced_first: the first token of the output, if it is always the same.
        forced_end: the last token of an output that is as long as it may be, if it is always the same.
        max_tokens: of an output, what the decoder begins with not counted; ``None``: what has room.
        min_tokens: before which it does not end.
        no_repeat_ngram: no run of so many tokens comes twice; 0 for none.
        banned: tokens that are never output.
    """

    info: EncoderDecoderInfo
    start: list[int]
    forced_first: int | None = None
    forced_end: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    no_repeat_ngram: int = 0
    banned: Sequence[int] = ()

    def bare(self) -> Target:
        """Only what the decoder needs: how a target begins, and how one ends that is too long."""
        return Target(self.info, self.start, self.forced_first, self.forced_end)


def read_target(
    said: Sequence[Mapping[str, Any]],
    info: EncoderDecoderInfo,
    vocabulary: int,
    ends: Collection[int] = (),
) -> tuple[Target, set[str]]:
    """Reads a target's settings.

    Args:
        said: ``generation_config.json`` and ``config.json``, the first of which wins.
        info: lengths of source and target.
        vocabulary: number of logits.
        ends: tokens that end an output.

    Returns:
        The settings, and the names of fields of ``generation_config.json`` that are in them.

    Raises:
        RefusedError: it is not said what the decoder begins with, or no token may be output.
    """
    start = _start(said, vocabulary)
    # As in transformers, the config counts only where there is no file of its own for generation.
    file = said[0] or said[1]
    longest = _count(file, "max_new_tokens") or max(0, _count(file, "max_length") - 1) or None
    used = set(USED)
    banned, all_used = _banned(file, vocabulary, ends)
    if len(banned) >= vocabulary:
        raise RefusedError(
            "generation_config.json: suppress_tokens and bad_words_ids ban every token, so that there is no "
            "output; fetch the model's own files again"
        )
    shortest = _count(file, "min_new_tokens") or max(0, _count(file, "min_length") - 1)
    if shortest and len({*banned, *ends}) >= vocabulary:
        raise RefusedError(
            "generation_config.json: before min_length or min_new_tokens no token may be output, since all "
            "are banned (suppress_tokens, bad_words_ids) or end it (eos_token_id); fetch the model's own "
            "files again"
        )
    if all_used:
        used.add("bad_words_ids")
    return (
        Target(
            info=info,
            start=[start],
            forced_first=_token(file, "forced_bos_token_id", vocabulary),
            forced_end=_token(file, "forced_eos_token_id", vocabulary),
            max_tokens=longest,
            min_tokens=shortest,
            no_repeat_ngram=_count(file, "no_repeat_ngram_size", _MOST_NGRAM),
            banned=banned,
        ),
        used,
    )


def _start(said: Sequence[Mapping[str, Any]], vocabulary: int) -> int:
    """What the decoder begins with: as in transformers, the first file wins, even by its second key.

    Raises:
        RefusedError: it is not said, or is no token.
    """
    names = ("decoder_start_token_id", "bos_token_id")
    found = [
        (file, name, one[name])
        for file, one in zip(("generation_config.json", "config.json"), said, strict=True)
        for name in names
        if one.get(name) is not None
    ]
    if not found:
        raise RefusedError(
            "what the decoder begins with is not said: generation_config.json and config.json have no "
            "decoder_start_token_id, so fetch the model's own files again"
        )
    file, name, value = found[0]
    start = _token({name: value}, name, vocabulary)
    if start is None:
        raise RefusedError(
            f"{file}: {name} is {quoted(value)}, which is no token of the model, so that it is not known "
            "what the decoder begins with; fetch the model's own files again"
        )
    other = said[1].get(names[0])
    if name != names[0] and other is not None and other != value:
        log.warning(
            "%s has no %s, so that the decoder begins with its %s, %d, as in transformers, and not with "
            "config.json's %s, %s",
            *(file, names[0], name, start, names[0], quoted(other)),
        )
    return start


def _banned(file: Mapping[str, Any], vocabulary: int, ends: Collection[int]) -> tuple[list[int], bool]:
    """Single tokens that may never be output, and whether those are all words that are banned."""

    def known(token: Any) -> bool:
        return type(token) is int and 0 <= token < vocabulary

    words, suppressed = file.get("bad_words_ids") or [], file.get("suppress_tokens") or []
    if not isinstance(words, list):
        words = []  # the log names the field as one that is not used
        all_used = False
    else:
        single = [word for word in words if isinstance(word, list) and len(word) == 1 and known(word[0])]
        all_used = len(single) == len(words)
        # As in transformers: what ends an output is no bad word.
        words = [word[0] for word in single if word[0] not in ends]
    tokens = list(filter(known, suppressed)) if isinstance(suppressed, list) else []
    if not isinstance(suppressed, list) or len(tokens) < len(suppressed):
        log.warning("suppress_tokens is %s; what is no token of the model is not used", quoted(suppressed))
    return sorted({*words, *tokens}), all_used


def _token(file: Mapping[str, Any], name: str, vocabulary: int) -> int | None:
    """A token's id; ``None`` where there is none, with a warning where it can be none."""
    value = file.get(name)
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    if value is None or (type(value) is int and 0 <= value < vocabulary):
        return value
    log.warning("%s is %s, which is no token of the model; it is not used", name, quoted(value))
    return None


def _count(file: Mapping[str, Any], name: str, most: int = 2**31) -> int:
    """A number of tokens; 0 where there is none, with a warning where it can be none."""
    value = file.get(name)
    if value is None or (type(value) is int and 0 <= value <= most):
        return value or 0
    log.warning(
        "%s is %s, which is not a number of tokens up to %d; it is not used", name, quoted(value), most
    )
    return 0
