"""Whether a folder holds an encoder, and what it can do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.encoder_messages import Task
from server.errors import RefusedError
from server.models.json_file import read_object

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
    """Whether the model in a folder is an encoder; a config that can't be read is none."""
    try:
        written = read_object(folder / "config.json")
    except RefusedError:
        return False
    if names_decoder(written):
        return False
    # transformers takes seconds to import, and a packed decoder does without.
    from server.models.recognize import is_encoder, read_any_config

    return is_encoder(read_any_config(folder))


def read_tasks(config: Any) -> tuple[Task, ...]:
    """What an encoder can do, by the head that its config names.

    Raises:
        RefusedError: its head is of a task that is not served, or its attention can't be computed here.
    """
    named = config.architectures or [""]
    if not isinstance(named, list) or not isinstance(named[0], str):
        raise RefusedError(
            f"the config's architectures are {str(named)[:80]}, which is no list of names; fetch the model's "
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
