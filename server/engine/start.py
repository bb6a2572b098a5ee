"""The engine for a model folder: of a decoder, an encoder or an encoder-decoder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from server.engine.build import build_engine
from server.engine.core import EngineCore
from server.engine.prepare import Report
from server.messages import Ready
from server.models.encoder_decoders.recognize import holds_encoder_decoder
from server.models.encoders.recognize import holds_encoder
from server.settings import Settings

if TYPE_CHECKING:
    from server.engine.encoder_core import EncoderCore


def start_engine(
    settings: Settings, folder: Path, report: Report, arrivals: int, tokenizer: Path | None
) -> tuple[EngineCore | EncoderCore, Ready]:
    """Loads the model in a folder.

    Args:
        settings: of the server.
        folder: the model, a Hugging Face folder.
        report: told what is going on, with the share done.
        arrivals: a descriptor that has something to read once a message to the engine has come.
        tokenizer: the folder of the model's tokenizer; ``None`` if it has none.

    Raises:
        RefusedError: the model, the settings and the machine don't go together; the sentence says why.
    """
    # These import transformers, which a packed decoder does without.
    if holds_encoder(folder):
        from server.engine.encoder_build import build_encoder

        return build_encoder(settings, folder, report)
    if holds_encoder_decoder(folder):
        from server.engine.prepare_encoder_decoder import prepare_encoder_decoder

        return build_engine(settings, folder, report, prepare_encoder_decoder, tokenizer=tokenizer)
    return build_engine(settings, folder, report, arrivals=arrivals, tokenizer=tokenizer)
