"""Whether a folder holds an encoder or an embedder, a decoder made for embeddings, and what it can do."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.encoder_messages import Task
from server.errors import RefusedError, quoted
from server.models.encoders.sentence import has_pooling
from server.models.json_file import read_object

log = logging.getLogger("longspan.models")

# Endings of the names of decoders' classes, which need no look at transformers' lists.
_DECODERS = ("ForCausalLM", "LMHeadModel")
_LABELS = "ForSequenceClassification"
_MASKED = ("ForMaskedLM", "ForPreTraining")
# Heads that are trained and would be dropped.
_REFUSED = (
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "ForNextSentencePrediction",
    "ElectraForPreTraining",  # it tells tokens that were replaced
)


def names_decoder(written: Mapping[str, Any]) -> bool:
    """Whether a config as it is written names a decoder's class."""
    named = written.get("architectures")
    return isinstance(named, list) and bool(named) and str(named[0]).endswith(_DECODERS)


def holds_encoder(folder: Path) -> bool:
    """Whether the model in a folder is an encoder or an embedder; a config that can't be read is none.

    Raises:
        RefusedError: the folder's files contradict each other, or need code of their own.
    """
    try:
        written = read_object(folder / "config.json")
    except RefusedError:
        return False
    embeds = has_pooling(folder)
    if not embeds and names_decoder(written):
        return False
    # transformers takes seconds to import, and a packed decoder does without.
    from server.models.recognize import is_decoder, is_encoder, read_any_config

    config = read_any_config(folder)
    return is_encoder(config) or (embeds and is_decoder(config))


def check_embedder(folder: Path, config: Any) -> None:
    """Refuses a decoder made for embeddings that transformers' own class may not compute as it was meant.

    Raises:
        RefusedError: says why.
    """
    code = read_object(folder / "config.json").get("auto_map")
    if isinstance(code, dict) and "AutoModel" in code:
        raise RefusedError(
            f"{folder} brings Python code that computes its vectors, which Longspan never runs, and "
            f"transformers' own {config.model_type} may compute others; choose an embedder without such code"
        )
    if config.get_text_config(decoder=True) is not config:
        raise RefusedError(
            f"{config.model_type} is a multimodal model, whose text model alone is not embedded with; choose "
            "an embedder of texts"
        )
    log.info(
        "%s has a Pooling (modules.json), so this %s embeds; without one it generates",
        folder,
        config.model_type,
    )


def read_tasks(config: Any) -> tuple[Task, ...]:
    """An encoder's tasks, by the head that its config names.

    Raises:
        RefusedError: its head is of a task that is not served, or its attention can't be computed here.
    """
    named = config.architectures or [""]
    if not isinstance(named, list) or not isinstance(named[0], str):
        raise RefusedError(
            f"the config's architectures are {quoted(named)}, which is no list of names; fetch the model's "
            "own config.json"
        )
    name = named[0]
    if name.endswith(_REFUSED):
        raise RefusedError(
            f"{name} has a head whose task is not served; choose an encoder with a head for masked tokens or "
            "for labels of whole texts, or with none"
        )
    if (kind := getattr(config, "position_embedding_type", "absolute")) != "absolute":
        raise RefusedError(
            f"the model's positions are {kind}, which transformers no longer computes; choose another model"
        )
    if name.endswith(_LABELS):
        return Task.EMBED, Task.SCORE
    return (Task.EMBED, Task.FILL) if name.endswith(_MASKED) else (Task.EMBED,)
