"""The small encoder-decoder: ANNalog, fetched with pip from the wheel that carries its weights.

It was trained to write analogues of a molecule in SMILES (Dai et al.: ANNalog, 2025). The wheel names the MIT
license.
"""

from __future__ import annotations

from pathlib import Path

from server.errors import RefusedError
from server.models.cache import Report, make_once
from server.models.conversions import ConversionError, run_conversion
from server.models.convert import models_folder
from server.models.wheel import Wheel, fetch_wheel, unpack

NAME = "annalog"
EXAMPLE = "CC(=O)Oc1ccccc1C(=O)O"
"""A source: aspirin. Other texts than SMILES are all unknown tokens to the model."""
REQUIREMENT = "annalog==1.0.6"
FILE = "annalog/ckpt_and_vocab/Lev_extended.pt"
SHA256 = "9e22e755b5d47da3c678bc19073e4f4af12ae061c91a7e5382cea67e30fad97b"
"""Of this file."""

# Raised when conversion changes, so that the folder of an older version is made again.
_VERSION = 1
_WHEEL = Wheel(NAME, REQUIREMENT, 15_200_144)


def annalog_folder(cache_dir: Path) -> Path:
    """Where the model lies once it was fetched."""
    return models_folder(cache_dir) / f"annalog-{SHA256[:12]}-{_VERSION}"


def fetch_annalog(cache_dir: Path, report: Report) -> Path:
    """The model's Hugging Face folder in the cache, fetched, verified and converted the first time.

    Args:
        cache_dir: of the settings.
        report: told the progress.

    Raises:
        RefusedError: pip is missing or fails, or what it brings is not the model that it should be.
    """
    return make_once(
        annalog_folder(cache_dir), lambda partial: fetch_wheel(_WHEEL, partial, _extract, report), report
    )


def _extract(wheel: Path, target: Path) -> None:
    file = wheel.with_name("weights.pt")
    unpack(wheel, {FILE: file}, SHA256, NAME)
    try:
        run_conversion("server.models.annalog_convert", file, target, lambda line: None)
    except ConversionError as error:
        raise RefusedError(f"{NAME} can't be converted: {error}; name a folder: --model FOLDER") from error
