"""Whether a folder holds an encoder-decoder, and whether it is of a kind that can be served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from server.errors import RefusedError
from server.models.encoders.recognize import names_decoder
from server.models.json_file import read_object

_HEADS = ("ForSequenceClassification", "ForQuestionAnswering", "ForTokenClassification")


def holds_encoder_decoder(folder: Path) -> bool:
    """Whether the model in a folder is an encoder-decoder; a config that can't be read is none."""
    try:
        written = read_object(folder / "config.json")
    except RefusedError:
        return False
    if names_decoder(written):
        return False
    # transformers takes seconds to import, and a packed decoder does without.
    from server.models.recognize import read_any_config

    return bool(read_any_config(folder).is_encoder_decoder)


def check_kind(config: Any, folder: Path) -> None:
    """Refuses encoder-decoders of which no weight need be read.

    Args:
        config: of the model, as transformers reads it.
        folder: of the model.

    Raises:
        RefusedError: its source is no text, its head makes no tokens, source and target have vocabularies of
            their own, or transformers gives no way to its decoder's attention.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

    from server.models.encoder_decoders.led import is_led

    own = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING.get(type(config), None)
    if own is None:
        raise RefusedError(
            f"{config.model_type} is an encoder-decoder that transformers can't load as a model from text to "
            "text; choose one such as T5, BART or Marian, or a decoder-only language model"
        )
    named = config.architectures or []
    if named and str(named[0]).endswith(_HEADS):
        raise RefusedError(
            f"{str(named[0])[:80]} has a head whose task is not served; choose an encoder-decoder that "
            "generates text"
        )
    if getattr(config, "share_encoder_decoder_embeddings", True) is False and not _one_vocabulary(folder):
        raise RefusedError(
            f"{own.__name__} has a vocabulary for the source and another one for the target, and a "
            "tokenizer.json has one, so outputs would become other words; choose a model with one for both"
        )
    if not own._can_set_attn_implementation() and not is_led(own):
        raise RefusedError(
            f"{own.__name__} does not go through transformers' attention interface, which Longspan needs; "
            "choose another architecture"
        )


def _one_vocabulary(folder: Path) -> bool:
    """Whether the tokenizer says that source and target have one, though their embeddings differ.

    The field is that of Marian's tokenizers, which leave it out in older files.
    """
    file = folder / "tokenizer_config.json"
    return file.is_file() and read_object(file).get("separate_vocabs") is False
