"""Whether a Hugging Face folder has all that serving needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from server.errors import RefusedError
from server.models.checkpoint.files import check_shards

_WHOLE = ("model.safetensors", "pytorch_model.bin")


def check_folder(folder: Path) -> None:
    """Looks for a config and complete weights.

    Raises:
        RefusedError: something is missing, unreadable or contradictory; the sentence says what.
    """
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise RefusedError(f"{folder} holds an adapter, not a model; merge it into its base model first")
        if files := sorted(folder.glob("*.gguf")):
            raise RefusedError(f"{folder} holds GGUF files; name one of them: --model {files[0]}")
        raise RefusedError(f"{folder} has no config.json, so it is no Hugging Face model folder")
    _read(folder / "config.json")
    _check_adapter(folder)
    files, index = _weights(folder)
    check_shards(folder, files, index)


def weight_files(folder: Path) -> list[Path]:
    """The files of the weights, safetensors where there are any.

    Raises:
        RefusedError: there are none, or one that the index names is missing.
    """
    return _weights(folder)[0]


def _weights(folder: Path) -> tuple[list[Path], list[str]]:
    """The files, and the tensors that their index names, if they have one."""
    named = _read(folder / "config.json").get("transformers_weights")
    whole = _WHOLE if named is None else (str(named).removesuffix(".index.json"),)
    for name in whole:
        if (folder / name).is_file():
            return [folder / name], []
        index = folder / f"{name}.index.json"
        if index.is_file():
            weight_map = _read(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(
                isinstance(shard, str) for shard in weight_map.values()
            ):
                raise RefusedError(f"{index} can't be read: it has no weight_map of file names")
            shards = sorted(set(weight_map.values()))
            if missing := [shard for shard in shards if not (folder / shard).is_file()]:
                raise RefusedError(
                    f"{folder} lacks {len(missing)} of its {len(shards)} weight files, "
                    f"{missing[0]} among them; fetch it again"
                )
            if not isinstance(_read(index).get("metadata"), dict):
                raise RefusedError(
                    f"{index} can't be read: it has no metadata, which transformers asks for; "
                    'add "metadata": {} beside its weight_map'
                )
            if shards:
                return [folder / shard for shard in shards], sorted(weight_map)
    raise RefusedError(
        f"{folder} has no weights: neither {' nor '.join(whole)} nor an index of several files"
    )


def _check_adapter(folder: Path) -> None:
    adapter = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
    if found := [name for name in adapter if (folder / name).is_file()]:
        raise RefusedError(
            f"{folder} holds {found[0]} beside the weights, and whether the adapter is part of them can't be "
            "told; merge it into its base model and save that alone, or remove the adapter's files"
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RefusedError(f"{path} can't be read: {error}") from error
    if not isinstance(content, dict):
        raise RefusedError(f"{path} can't be read: it holds no JSON object")
    return content
