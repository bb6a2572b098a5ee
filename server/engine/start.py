"""The engine for a model folder: of a decoder or of an encoder."""

from __future__ import annotations

from pathlib import Path

from server.engine.build import build_engine
from server.engine.core import EngineCore
from server.engine.encoder_core import EncoderCore
from server.engine.prepare import Report
from server.messages import Ready
from server.models.encoders.recognize import holds_encoder
from server.settings import Settings


def start_engine(settings: Settings, folder: Path, report: Report) -> tuple[EngineCore | EncoderCore, Ready]:
    """Loads the model in a folder.

    Args:
        settings: of the server.
        folder: the model, a Hugging Face folder.
        report: told what is going on, with the share done.

    Raises:
        RefusedError: the model, the settings and the machine don't go together; the sentence says why.
    """
    if not holds_encoder(folder):
        return build_engine(settings, folder, report)
    # It imports transformers, which a packed decoder does without.
    from server.engine.encoder_build import build_encoder

    return build_encoder(settings, folder, report)
