"""Whether a Hugging Face folder has all that serving needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from server.engine.types import RefusedError

_WHOLE = ("model.safetensors", "pytorch_model.bin")


def check_folder(folder: Path) -> None:
    """Looks for a config and complete weights.

    Raises:
        RefusedError: something is missing or unreadable; the sentence says what.
    """
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise RefusedError(f"{folder} holds an adapter, not a model; merge it into its base model first")
        if files := sorted(folder.glob("*.gguf")):
            raise RefusedError(f"{folder} holds GGUF files; name one of them: --model {files[0]}")
        raise RefusedError(f"{folder} has no config.json, so it is no Hugging Face model folder")
    _read(folder / "config.json")
    weight_files(folder)


def weight_files(folder: Path) -> list[Path]:
    """The files of the weights, safetensors where there are any.

    Raises:
        RefusedError: there are none, or one that the index names is missing.
    """
    for name in _WHOLE:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(_read(index).get("weight_map", {}).values()))
            if missing := [shard for shard in shards if not (folder / shard).is_file()]:
                raise RefusedError(
                    f"{folder} lacks {len(missing)} of its {len(shards)} weight files, "
                    f"{missing[0]} among them; fetch it again"
                )
            if shards:
                return [folder / shard for shard in shards]
    raise RefusedError(
        f"{folder} has no weights: neither {' nor '.join(_WHOLE)} nor an index of several files"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RefusedError(f"{path} can't be read: {error}") from error
    if not isinstance(content, dict):
        raise RefusedError(f"{path} can't be read: it holds no JSON object")
    return content
