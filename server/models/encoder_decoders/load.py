"""Loads an encoder-decoder's folder into transformers' own class, with attention handed to Longspan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from attention.hook import register
from attention.layers import IMPLEMENTATION
from attention.roles import Roles, read_roles
from server.encoder_messages import EncoderDecoderInfo
from server.errors import RefusedError
from server.models.checkpoint.reading import read_stored
from server.models.encoder_decoders.led import hand_over, is_led
from server.models.encoder_decoders.prove import Own, compute_own
from server.models.encoder_decoders.recognize import check_kind
from server.models.encoders.prepacked import prepack
from server.models.executors.base import filled
from server.models.folder import weight_files
from server.models.halves import Halves
from server.models.limits import check_positions
from server.models.load import read_model
from server.models.loaded import LoadedModel
from server.models.positions import has_table
from server.models.recognize import read_any_config
from server.models.refusing import refusing

# Of models whose positions are distances, which have no end: what T5 was made with.
_USUAL_LENGTH = 512


@dataclass(frozen=True, slots=True)
class LoadedEncoderDecoder:
    """An encoder-decoder whose attention is still to be chosen and proven.

    Attributes:
        loaded: the model.
        own: what transformers itself computes with it.
        info: what a server tells of it.
    """

    loaded: LoadedModel
    own: Own
    info: EncoderDecoderInfo


def load_encoder_decoder(
    folder: Path,
    dtype: str,
    device: str,
    max_context: int | None,
    page_size: int,
    report: Callable[[str, float], None],
    *,
    to_pack: bool = False,
) -> LoadedEncoderDecoder:
    """Loads, freezes, and reads what attention must honor. Code that comes with a checkpoint is never run.

    Args:
        folder: a Hugging Face folder.
        dtype: ``float32``, ``bfloat16`` or ``float16``; ``auto`` is float32 on the CPU and the checkpoint's
            own elsewhere.
        device: ``cpu`` or ``cuda``.
        max_context: most tokens of a source, and of a target; ``None`` for the model's own limit.
        page_size: tokens per page.
        report: told the progress.
        to_pack: its linear layers are packed later, and stay torch's own until then.

    Raises:
        RefusedError: the model can't be served; the sentence says why.
    """
    report("reading the config", 0.0)
    config = read_any_config(folder)
    with refusing(f"the model in {folder}", "reading its config"):
        check_kind(config, folder)
    stored = read_stored(weight_files(folder))
    kind = transformers.AutoModelForSeq2SeqLM
    model = read_model(kind, folder, config, stored, dtype, torch.device(device), report)
    architecture = type(model).__name__
    vocabulary = _vocabulary(model)
    parameters = sum(weight.numel() for weight in model.parameters())
    report("reading the attention layers", 0.7)
    with refusing(architecture, "reading its layers"):
        info = _lengths(model, max_context)
        own = compute_own(model, info)
        register()
        roles = _through_longspan(model, _layers(config))
        linears = "linear layers are packed" if to_pack else prepack(model)
        halves = Halves(model, roles, info, linears)
    loaded = LoadedModel(
        model=model,
        layers=roles.layers,
        architecture=architecture,
        parameters=parameters,
        vocabulary_size=vocabulary,
        context_length=filled(info.source_length, page_size) + info.target_length,
        dtype=model.dtype,
        halves=halves,
    )
    return LoadedEncoderDecoder(loaded, own, info)


def _vocabulary(model: Any) -> int:
    """Number of logits, each of a token that source and target may have.

    Raises:
        RefusedError: one of them may not, so that a client's token could end the engine.
    """
    count: int = model.get_output_embeddings().weight.shape[0]
    for half, what in ((model.get_encoder(), "source"), (model.get_decoder(), "target")):
        known = half.get_input_embeddings().weight.shape[0]
        if known < count:
            raise RefusedError(
                f"{type(model).__name__} cannot be served: it predicts {count} tokens, of which its {what} "
                f"may have {known}; choose a model with one vocabulary"
            )
    return count


def _layers(config: Any) -> int:
    """Of the decoder."""
    for name in ("decoder_layers", "num_decoder_layers"):
        if isinstance(count := getattr(config, name, None), int):
            return count
    count = config.get_text_config(decoder=True).num_hidden_layers
    return int(count)


def _through_longspan(model: Any, layers: int) -> Roles:
    """Hands a model's attention to ``longspan``, but for an encoder's that has its own code."""
    if is_led(type(model)):
        hand_over(model)
        return read_roles(model, layers)
    model.set_attn_implementation(IMPLEMENTATION)
    roles = read_roles(model, layers)
    if not roles.encoder:
        model.get_encoder().set_attn_implementation("eager")
    return roles


def _lengths(model: Any, max_context: int | None) -> EncoderDecoderInfo:
    """Most tokens of a source and of a target.

    Raises:
        RefusedError: more were asked for than the model has positions.
    """
    config = model.config
    if not has_table(model.get_decoder()):
        length = max_context or getattr(config, "n_positions", None) or _USUAL_LENGTH
        return EncoderDecoderInfo(length, length)
    if not is_led(type(model)):
        own: int = config.max_position_embeddings
        check_positions(max_context, own)
        return EncoderDecoderInfo(max_context or own, max_context or own)
    # Its encoder fills sources up to whole windows, whose positions must be there too.
    window, positions = max(config.attention_window), config.max_encoder_position_embeddings
    own = positions // window * window
    if own == 0:
        raise RefusedError(
            f"config.json: attention_window is {window}, more than max_encoder_position_embeddings, "
            f"{positions}, so that no window fits; fetch the model's own files again"
        )
    check_positions(max_context, own)
    source = max_context or own
    return EncoderDecoderInfo(source, min(source, config.max_decoder_position_embeddings))
