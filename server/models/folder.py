"""Whether a Hugging Face folder has all that serving needs."""

from __future__ import annotations

from pathlib import Path

from server.errors import RefusedError, quoted
from server.models.checkpoint.files import check_shards
from server.models.json_file import read_object

_SAFE = ".safetensors"
_WHOLE = (f"model{_SAFE}", "pytorch_model.bin")


def check_folder(folder: Path, *, pickles: bool = False) -> None:
    """Looks for a config and complete weights.

    Args:
        folder: of the model.
        pickles: whether weights may be pickles.

    Raises:
        RefusedError: something is missing, unreadable, contradictory or outside the folder; the sentence says
            what.
    """
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise RefusedError(f"{folder} holds an adapter, not a model; merge it into its base model first")
        if files := sorted(folder.glob("*.gguf")):
            raise RefusedError(f"{folder} holds GGUF files; name one of them: --model {files[0]}")
        raise RefusedError(f"{folder} has no config.json, so it is no Hugging Face model folder")
    _check_links(folder)
    read_object(folder / "config.json")
    _check_adapter(folder)
    files, index = _weights(folder)
    if not pickles and (found := [file.name for file in files if file.suffix != _SAFE]):
        raise RefusedError(
            f"{folder} has its weights in {found[0]}, a pickle, which can hold more than numbers; save the "
            "model as safetensors, or read it nevertheless: --allow-pickle"
        )
    check_shards(folder, files, index)


def weight_files(folder: Path) -> list[Path]:
    """The files of the weights, safetensors where there are any.

    Raises:
        RefusedError: there are none, or one that the index names is missing.
    """
    return _weights(folder)[0]


def _weights(folder: Path) -> tuple[list[Path], list[str]]:
    """The files, and the tensors that their index names, if they have one."""
    named = read_object(folder / "config.json").get("transformers_weights")
    whole = _WHOLE if named is None else (str(named).removesuffix(".index.json"),)
    for name in whole:
        _check_name(folder / "config.json", name)
        if (folder / name).is_file():
            return [folder / name], []
        index = folder / f"{name}.index.json"
        if index.is_file():
            weight_map = read_object(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(
                isinstance(shard, str) for shard in weight_map.values()
            ):
                raise RefusedError(f"{index} can't be read: it has no weight_map of file names")
            shards = sorted(set(weight_map.values()))
            for shard in shards:
                _check_name(index, shard)
            if missing := [shard for shard in shards if not (folder / shard).is_file()]:
                raise RefusedError(
                    f"{folder} lacks {len(missing)} of its {len(shards)} weight files, "
                    f"{missing[0]} among them; fetch it again"
                )
            if not isinstance(read_object(index).get("metadata"), dict):
                raise RefusedError(
                    f"{index} can't be read: it has no metadata, which transformers asks for; "
                    'add "metadata": {} beside its weight_map'
                )
            if shards:
                return [folder / shard for shard in shards], sorted(weight_map)
    raise RefusedError(
        f"{folder} has no weights: neither {' nor '.join(whole)} nor an index of several files"
    )


def _check_name(said: Path, name: str) -> None:
    """Refuses what could lie elsewhere than beside the file that names it."""
    if Path(name).name != name:
        raise RefusedError(
            f"{said} names the weights {quoted(name)}, which is no name of a file beside it; "
            "fetch the model again"
        )


def _check_links(folder: Path) -> None:
    """Refuses texts that a link brings from elsewhere, since parts of them may reach the model's clients.

    Weights may lie anywhere: they are numbers, or refused. The hub's cache keeps all files in one folder of a
    repository and links to them.
    """
    home = folder.resolve()
    for file in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*")]):
        if not file.is_symlink() or file.suffix in (_SAFE, ".bin"):
            continue
        try:
            target = file.resolve()
        except (OSError, RuntimeError) as error:
            raise RefusedError(
                f"{file} is a link that leads nowhere ({error}); put the file itself there"
            ) from error
        in_hub = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
        if not in_hub and not target.is_relative_to(home):
            raise RefusedError(
                f"{file} is a link to a file outside the model's folder; put the file itself there, or name "
                "the folder that has it"
            )


def _check_adapter(folder: Path) -> None:
    adapter = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
    if found := [name for name in adapter if (folder / name).is_file()]:
        raise RefusedError(
            f"{folder} holds {found[0]} beside the weights, and whether the adapter is part of them can't be "
            "told; merge it into its base model and save that alone, or remove the adapter's files"
        )
