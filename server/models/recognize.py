"""The kind of model in a folder; those that can't be served are refused before any weights are read."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
)

from attention.layers import KNOWN_TYPES, strange_types
from server.errors import RefusedError, quoted
from server.models.claims import check_numbers, check_ropes
from server.models.json_file import read_object
from server.models.refusing import refusing, sentence

log = logging.getLogger("longspan.models")

# How transformers' classes are called whose output is no next token.
_OTHER_HEADS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "ForMaskedLM",
    "ForRewardModel",
    "RewardModel",
)
_CHOOSE = "choose a decoder-only language model"


def read_config(folder: Path) -> Any:
    """The config of a causal language model.

    Raises:
        RefusedError: it can't be read, needs code of its own, or is of a kind of model that can't be served.
    """
    config = read_any_config(folder)
    with refusing(f"the model in {folder}", "reading its config"):
        _check_kind(folder, config)
    return config


def read_any_config(folder: Path) -> Any:
    """The config of a model of any kind that transformers knows.

    Raises:
        RefusedError: it can't be read, or needs code of its own.
    """
    _check_type(folder)
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # configs validate themselves in many ways
        if "trust_remote_code" in str(error):
            raise RefusedError(_needs_code(folder)) from error
        raise RefusedError(f"{folder}/config.json can't be used: {sentence(error)}") from error
    with refusing(f"the model in {folder}", "reading its config"):
        check_ropes(config)
    return config


def _needs_code(folder: Path) -> str:
    return (
        f"{folder} needs Python code that comes with the checkpoint, which Longspan never runs; "
        "choose a model that transformers itself supports"
    )


def _check_type(folder: Path) -> None:
    """Looks at the architecture's name, which transformers would guess from the folder's if it had none."""
    written = read_object(folder / "config.json")
    check_numbers(folder / "config.json", written)
    kind, code = written.get("model_type"), written.get("auto_map")
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        if code:
            log.info("the Python code in %s is not run: transformers has %s itself", folder, kind)
        return
    if code:
        raise RefusedError(_needs_code(folder))
    if not kind:
        raise RefusedError(
            f"{folder}/config.json names no model_type, so it can't be told which architecture this is; "
            "choose a checkpoint in transformers' format"
        )
    if kind == "transfo-xl":
        raise RefusedError(
            f"{folder} holds Transformer-XL (transfo-xl), of which transformers has no class any more, and "
            "whose memory of earlier segments has no place in a paged KV cache; choose another model, for a "
            "like reach with --attention sparse --attention-option pattern=segment"
        )
    raise RefusedError(
        f"{folder}/config.json can't be used: transformers {transformers.__version__} knows no model type "
        f"{quoted(kind)}; choose another model, or install a version of transformers that knows it"
    )


def _check_kind(folder: Path, config: Any) -> None:
    kind = config.model_type
    if config.is_encoder_decoder:
        raise RefusedError(f"{kind} is an encoder-decoder model; {_CHOOSE}")
    named = config.architectures or []
    first = str(named[0])[:80] if named else kind
    if is_encoder(config):
        raise RefusedError(
            f"{folder} holds {first}, an encoder: its tokens see those after them too, "
            f"so that it gives embeddings or labels and writes no text; {_CHOOSE}"
        )
    if named and all(name.endswith(_OTHER_HEADS) for name in named):
        raise RefusedError(
            f"{folder} holds {first}, whose output are labels or scores and no next tokens; {_CHOOSE}"
        )
    own = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if own is None:
        what = "is no causal language model"
        if config.get_text_config(decoder=True) is not config:
            what = "is a multimodal model that transformers can't load as a causal language model"
        elif named and named[0].endswith("ForCausalLM"):
            what = f"describes a part of a model, from which transformers can't load {first} alone"
        raise RefusedError(f"{kind} {what}; {_CHOOSE}")
    _check_class(own, config)


def is_encoder(config: Any) -> bool:
    """Whether its tokens see those after them too. Encoders' classes can be decoders, and tell by a field."""
    return (
        type(config) in MODEL_FOR_MASKED_LM_MAPPING
        and type(config) not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
        and not getattr(config, "is_decoder", False)
    )


def is_decoder(config: Any) -> bool:
    """Whether it is a causal language model's config, with or without the head that generates."""
    generates = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not config.is_encoder_decoder
    return generates and not is_encoder(config)


def _check_class(own: Any, config: Any) -> None:
    text = config.get_text_config(decoder=True)
    strange = strange_types(text)
    types = set(filter(None, getattr(text, "layer_types", None) or []))
    keeping = [kind for kind in strange if kind not in ("mlp", "moe")]  # which keep nothing
    if getattr(own, "_is_stateful", False) and not (types and types <= set(KNOWN_TYPES)):
        what = (
            f"in its {', '.join(keeping)} layers it keeps something else than each token's keys and values, "
            "like a state or keys that several tokens share"
            if keeping
            else "it keeps a state from token to token, as state-space and linear-attention models do"
        )
        raise RefusedError(
            f"{own.__name__} cannot be served: {what}, and a paged KV cache has no place for that; "
            "choose a model whose layers all attend"
        )
    if strange:
        raise RefusedError(
            f"{own.__name__} cannot be served: the paged cache would lose the structure of its "
            f"{', '.join(strange)} layers; choose a model whose layers all attend"
        )
    if getattr(text, "attn_temperature_tuning", False):
        raise RefusedError(
            f"{own.__name__} scales its queries by positions that it counts in each batch itself "
            "(attn_temperature_tuning), so that sequences cannot share one; choose another architecture"
        )
    # A multimodal model may leave attention to its text model's class.
    attending = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), own)
    if not own._can_set_attn_implementation() and not attending._can_set_attn_implementation():
        raise RefusedError(
            f"{own.__name__} does not go through transformers' attention interface, which Longspan "
            "needs; choose another architecture"
        )
