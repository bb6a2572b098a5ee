"""How a GGUF file wants text to be generated, in the words of transformers' generation config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.models.tokenizing.vocabulary import has_vocabulary, listed_ends, read_vocabulary, token_with_role

_SAMPLING = "general.sampling."
_NAMES = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
# Without effect unless the first of each is set: the rest only says how.
_OFF = {
    "xtc_probability": ("xtc_threshold",),
    "mirostat": ("mirostat_tau", "mirostat_eta"),
}
# How far back a penalty looks, where that is everywhere.
_ALL_TOKENS = -1


def generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of ``generation_config.json``.

    Tokens that end generation are those of ``eos_token_id(s)``, ``eot_token_id`` and ``eom_token_id``, and
    the control tokens that llama.cpp knows as ends by their text. Settings of ``general.sampling``
    that transformers has no name for keep llama.cpp's, so that a reader of the config can report them.

    Args:
        metadata: the file's values, by key.

    Raises:
        ValueError: a key names a token that the vocabulary does not have.
    """
    if not has_vocabulary(metadata):
        return _sampling(metadata)
    config: dict[str, Any] = {}
    vocabulary = read_vocabulary(metadata)
    size = len(vocabulary.tokens)
    ends = [token_with_role(metadata, role, size) for role in ("eos", "eot", "eom")]
    listed = listed_ends(metadata, size)
    ids = list(dict.fromkeys(token for token in (*ends, *listed, *vocabulary.ends()) if token is not None))
    if ids:
        config["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    for name, role in (("bos_token_id", "bos"), ("pad_token_id", "padding")):
        if (token := token_with_role(metadata, role, size)) is not None:
            config[name] = token
    if suppressed := metadata.get("tokenizer.ggml.suppress_tokens"):
        config["suppress_tokens"] = [int(token) for token in suppressed]
    return {**config, **_sampling(metadata)}


def _sampling(metadata: Mapping[str, Any]) -> dict[str, Any]:
    asked = {
        key.removeprefix(_SAMPLING): metadata[key] for key in list(metadata) if key.startswith(_SAMPLING)
    }
    for switch, details in _OFF.items():
        if not asked.get(switch):
            for name in (switch, *details):
                asked.pop(name, None)
    if asked.get("penalty_repeat", 1) == 1 or asked.get("penalty_last_n") == _ALL_TOKENS:
        asked.pop("penalty_last_n", None)
    if not asked:
        return {}
    temperature = asked.get("temp", 1)
    if temperature <= 0:
        del asked["temp"]
    return {"do_sample": temperature > 0, **{_NAMES.get(name, name): value for name, value in asked.items()}}
