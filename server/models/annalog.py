"""The small encoder-decoder: ANNalog, fetched with pip from the wheel that carries its weights.

It was trained to write analogues of a molecule in SMILES (Dai et al.: ANNalog, 2025). The wheel names the MIT
license.
"""

from __future__ import annotations

from pathlib import Path

from server.errors import RefusedError
from server.models.conversions import ConversionError, run_conversion
from server.models.wheel import Wheel, unpack

NAME = "annalog"
EXAMPLE = "CC(=O)Oc1ccccc1C(=O)O"
"""A source: aspirin. Other texts than SMILES are all unknown tokens to the model."""
REQUIREMENT = "annalog==1.0.6"
FILE = "annalog/ckpt_and_vocab/Lev_extended.pt"
SHA256 = "9e22e755b5d47da3c678bc19073e4f4af12ae061c91a7e5382cea67e30fad97b"
"""Of this file."""

# Raised when conversion changes, so that the folder of an older version is made again.
_VERSION = 1


def _extract(wheel: Path, target: Path) -> None:
    file = wheel.with_name("weights.pt")
    unpack(wheel, {FILE: file}, SHA256, NAME)
    try:
        run_conversion("server.models.annalog_convert", file, target, lambda line: None)
    except ConversionError as error:
        raise RefusedError(f"{NAME} can't be converted: {error}; name a folder: --model FOLDER") from error


WHEEL = Wheel(NAME, REQUIREMENT, 15_200_144, f"annalog-{SHA256[:12]}-{_VERSION}", _extract)
