"""Packed models kept on disk, so that a start reads 4 or 8 bits a weight instead of making them again.

A kept model was proven when it was made: that the layers are what attention was told, that the lean layers
compute what transformers' do, that packing changed no more than rounding can. It is good for the very files
and versions that it was made from. Each start compares its logits with those of the making, so
that this machine's operators, kernel and cache dtype are proven anew.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from attention.kernels.cpu.native import NativeError
from attention.types import LayerSpec
from server.models.folder import weight_files
from server.models.kept_parts import model_of, parts_of
from server.models.limits import context_length
from server.models.loaded import LoadedModel
from server.models.packed_file import BrokenFileError, read, write
from server.models.quantized import native
from server.models.quantized.model import QuantizedModel
from server.models.quantized.rotary import RotaryTable
from server.models.sampled import sampled_digest

log = logging.getLogger("longspan.models")

# Raised when the content of the file, or how it is packed or proven, changes.
_VERSION = 4


@dataclass(frozen=True, slots=True)
class KeptModel:
    """A packed model from disk.

    Attributes:
        loaded: the model.
        weights: form of the weights inside the decoder, as ``quantize`` says.
        length: its context's when it was made.
        sample: its ``sample.oracle_logits`` then.
    """

    loaded: LoadedModel
    weights: str
    length: int
    sample: torch.Tensor


def kept_file(folder: Path, weights: str, cache_dir: Path) -> Path:
    """Where the packed form of a model is kept.

    Args:
        folder: the model, a Hugging Face folder.
        weights: of the settings.
        cache_dir: of the settings.
    """
    place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]
    return cache_dir / "packed" / f"{folder.name}-{place}-{weights}.safetensors"


def read_kept(
    file: Path, folder: Path, *, max_context: int | None = None, reach: int | None = None
) -> KeptModel | None:
    """The packed model, if there is one that is still good.

    Args:
        file: see ``kept_file``.
        folder: the model that it must have been made from.
        max_context: as in ``limits.context_length``.
        reach: as in ``limits.context_length``.

    Raises:
        RefusedError: the context asked for is not possible.
    """
    try:
        description, tensors = read(file)
        if stale := _difference(description, made_from(folder)):
            raise BrokenFileError(stale)
        native.check()
        model = model_of(description["parts"], tensors)
    except FileNotFoundError:
        return None
    except NativeError:
        return None  # quantizing will say why there is no operator
    except BrokenFileError as error:
        log.warning("the packed weights in %s are made again: %s", file, error)
        return None
    except (LookupError, TypeError, ValueError) as error:
        log.warning("the packed weights in %s are made again: %s: %s", file, type(error).__name__, error)
        return None
    loaded = LoadedModel(
        model=model,
        layers=[LayerSpec(**layer) for layer in description["layers"]],
        architecture=description["architecture"],
        parameters=description["parameters"],
        vocabulary_size=model.head.out_features,
        context_length=context_length(model.config, max_context, reach=reach),
        dtype=torch.float32,
        mapped_bytes=file.stat().st_size,
    )
    return KeptModel(loaded, description["weights"], description["length"], tensors["sample"])


def keep(file: Path, source: Mapping[str, Any], kept: KeptModel) -> None:
    """Writes a packed model; where that is not possible, the log says so.

    Args:
        file: see ``kept_file``.
        source: ``made_from`` of its folder, from before its files were read.
        kept: its model is a ``QuantizedModel``.
    """
    loaded = kept.loaded
    parts, tensors = parts_of(loaded.model)
    description = dict(source) | {
        "weights": kept.weights,
        "length": kept.length,
        "architecture": loaded.architecture,
        "parameters": loaded.parameters,
        "layers": [asdict(layer) for layer in loaded.layers],
        "parts": parts,
    }
    try:
        write(file, description, {**tensors, "sample": kept.sample.contiguous()})
    except OSError as error:
        log.warning("the packed weights can't be kept, so that every start packs them again: %s", error)
    else:
        log.info("the packed weights are kept in %s", file)


def made_from(folder: Path) -> dict[str, Any]:
    """The files and versions that a packed model depends on.

    Raises:
        RefusedError: the folder lacks weights.
        OSError: a file can't be read.
    """
    files = [folder / "config.json", *weight_files(folder)]
    return {
        "version": _VERSION,
        "versions": {name: version(name) for name in ("longspan", "torch", "transformers")},
        # Their time is not enough: tools that copy files preserve it.
        "files": {file.name: [file.stat().st_mtime_ns, sampled_digest(file)] for file in files},
    }


def _difference(description: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if description.get("files") != now["files"]:
        return "the model's files have changed since"
    if any(description.get(name) != now[name] for name in ("version", "versions")):
        return "they are of other versions of longspan, torch or transformers"
    return ""


def why_not_kept(loaded: LoadedModel) -> str | None:
    """Why a model has to be packed at every start, as part of a sentence; ``None`` if it can be kept."""
    if not isinstance(loaded.model, QuantizedModel):
        return "its layers are not all of Llama's form, or not all packed"
    if not isinstance(loaded.model.rotary, RotaryTable):
        return "its rotary frequencies depend on lengths"
    return None
