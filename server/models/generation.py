"""A checkpoint's settings of generation: the tokens that end it, and sampling that requests leave unset."""

from __future__ import annotations

import json
import logging
import math
import struct
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from server.encoder_messages import Task
from server.errors import quoted
from server.messages import Ready, Sampling
from server.models.eos import eos_ids
from server.models.target import Target, read_target
from server.ranges import RANGES

log = logging.getLogger("longspan.models")

FILE = "generation_config.json"

_TAKEN = (*RANGES, "top_k")
_MOST_TOP_K = 2**32 - 1

# Fields that change nothing in what a decoder's answer says: tokens of the prompt, what ``generate`` returns,
# how it computes.
_SAYS_NOTHING = frozenset(
    {
        "_from_model_config",
        "transformers_version",
        "bos_token_id",
        "pad_token_id",
        "eos_token_id",
        "decoder_start_token_id",
        "trust_remote_code",
        "chat_format",
        "use_cache",
        "cache_implementation",
        "cache_config",
        "return_legacy_cache",
        "max_cache_len",
        "compile_config",
        "disable_compile",
        "prefill_chunk_size",
        "low_memory",
        "continuous_batching_config",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "return_dict_in_generate",
        "num_return_sequences",
        "renormalize_logits",
        "remove_invalid_values",
        "is_assistant",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "assistant_early_exit",
        "assistant_lookbehind",
        "target_lookbehind",
        "prompt_lookup_num_tokens",
        "max_matching_ngram_size",
        "speculation_type",
        "use_mtp",
    }
)
# Details of beam search, which ``num_beams`` asks for.
_OF_BEAMS = frozenset({"num_beam_groups", "diversity_penalty", "length_penalty", "early_stopping"})
# Values beside 0, false and nothing that leave sampling as it is.
_NEUTRAL = {
    "num_beams": 1,
    "typical_p": 1,
    "top_h": 1,
    "guidance_scale": 1,
    "encoder_repetition_penalty": 1,
}


@dataclass(frozen=True, slots=True)
class Generation:
    """A model's settings of generation, where requests leave them unset.

    Attributes:
        eos_token_ids: its end-of-sequence tokens, in ascending order.
        sampling: how tokens are sampled; without bias and seed.
        target: of an encoder-decoder.
    """

    eos_token_ids: Sequence[int]
    sampling: Sampling
    target: Target | None = None


def read_generation(
    folder: Path,
    ready: Ready,
    *,
    eos_token: str | None,
    token_id: Callable[[str], int | None],
    recommended: Mapping[str, float] | None,
) -> Generation:
    """Reads ``generation_config.json`` and what else names end-of-sequence tokens.

    Unusable entries are left out, with a warning that names them: a model can be served without.

    Args:
        folder: a Hugging Face folder.
        ready: the model as it is served.
        eos_token: the tokenizer's own end-of-sequence token.
        token_id: the id of a token of the tokenizer, ``None`` if it has none.
        recommended: the values that the model's makers recommend elsewhere; the file's own win. ``None``:
            whatever the file says, sampling that a request leaves unset is neutral.
    """
    if Task.GENERATE not in ready.tasks:
        return Generation([], Sampling())
    file = _read(folder / FILE)
    config = _read(folder / "config.json")
    inner = config.get("text_config")
    named = {
        FILE: file.get("eos_token_id"),
        "config.json": config.get("eos_token_id"),
        "config.json, text_config": inner.get("eos_token_id") if isinstance(inner, dict) else None,
        "the tokenizer": eos_token,
    }
    ends = eos_ids(named, token_id, ready.vocabulary_size)
    target, used = None, set[str]()
    if ready.encoder_decoder is not None:
        target, used = read_target((file, config), ready.encoder_decoder, ready.vocabulary_size, ends)
        # As in transformers, where nothing else is said.
        file = {"do_sample": False, **file}
    if recommended is None:
        return Generation(ends, Sampling(), None if target is None else target.bare())
    values = {name: _as_requested(name, value) for name, value in recommended.items()} | _sampling(file)
    if values:
        log.info(
            "requests that leave sampling unset get %s, as the model's makers recommend",
            ", ".join(f"{name} {value:g}" for name, value in values.items()),
        )
    if unused := _unused(file, ready.context_length, used):
        log.warning("%s asks for what Longspan does not do: %s", FILE, ", ".join(unused))
    return Generation(ends, msgspec.structs.replace(Sampling(), **values), target)


def _sampling(file: Mapping[str, Any]) -> dict[str, float]:
    """Values of ``Sampling``; those that no request could have are left out."""
    values = {}
    for name in _TAKEN:
        if (value := file.get(name)) is None:
            continue
        try:
            values[name] = _as_requested(name, value)
        except ValueError as error:
            log.warning("%s: %s is %s; it must be %s; it is not used", FILE, name, quoted(value), error)
    do_sample = file.get("do_sample")
    if do_sample is not None and not isinstance(do_sample, bool):
        log.warning("%s: do_sample is %s, neither true nor false; it is not used", FILE, quoted(do_sample))
    if do_sample is not False:
        return values
    # As in transformers, the rest is for sampling only: it must not narrow a request that has a temperature.
    penalties = {name: value for name, value in values.items() if name.endswith("_penalty")}
    if dropped := sorted(values.keys() - penalties.keys()):
        log.info("%s: do_sample is false, so that these are not used: %s", FILE, ", ".join(dropped))
    return {"temperature": 0.0, **penalties}


def _as_requested(name: str, value: Any) -> float:
    """A value as a request for it would bring it.

    Raises:
        ValueError: no request could; the message says what it must be.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name == "top_k":
        if number and value == -1:  # none, in other servers
            return 0
        if number and 0 <= value <= _MOST_TOP_K and value == int(value):
            return int(value)
        raise ValueError("a whole number at least 0")
    words, inside = RANGES[name]
    if number:
        with suppress(OverflowError, struct.error):
            rounded: float = struct.unpack("f", struct.pack("f", value))[0]
            if math.isfinite(rounded) and inside(rounded):
                return rounded
    raise ValueError(f"a number {words}")


def _unused(file: Mapping[str, Any], context_length: int, used: Set[str]) -> list[str]:
    """Fields that would change answers and do not; ``used`` are those of an encoder-decoder's target."""
    known = {*_TAKEN, "do_sample", *_SAYS_NOTHING, *used}
    if not _asks("num_beams", file.get("num_beams")):
        known |= _OF_BEAMS
    if isinstance(length := file.get("max_length"), int) and length >= context_length:
        known.add("max_length")
    return [
        f"{name} {quoted(value)}" for name, value in file.items() if name not in known and _asks(name, value)
    ]


def _asks(name: str, value: Any) -> bool:
    if name.startswith("forced_"):  # ids of tokens, and 0 is one
        return value is not None
    return bool(value) and value != _NEUTRAL.get(name)


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one, with a warning, where it can't be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s can't be read and is not used: %s", path, error)
        return {}
    if not isinstance(content, dict):
        log.warning("%s can't be read and is not used: it holds no JSON object", path)
        return {}
    return content
