"""Weights to safetensors files, a part of the model in memory at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers.core_model_loading import revert_weight_conversion

from server.models.gguf.file import GgufFile
from server.models.gguf.parameters import Parameter

# Weights that are held in memory before they are written, in bytes.
_SHARD = 2 << 30


def write_weights(
    folder: Path, model: Any, file: GgufFile, plan: list[Parameter], report: Callable[[float], None]
) -> None:
    """Writes every parameter, under the names that published checkpoints have.

    Those do not change from one version of transformers to the next, unlike the names in memory.

    Args:
        folder: where to write.
        model: of transformers, on any device, with the dtype to write in its config.
        file: holds the tensors.
        plan: of all parameters.
        report: told the share that is done.
    """
    dtype = model.config.dtype
    total = sum(_bytes(parameter, dtype) for parameter in plan)
    written: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    done = begun = 0
    for parameter, following in zip(plan, [*plan[1:], None], strict=True):
        pending[parameter.name] = parameter.compute(file).to(dtype)
        done += _bytes(parameter, dtype)
        # A layer's parameters can be one tensor in published checkpoints, or several.
        if following is None or _layer(following) != _layer(parameter):
            if following is None or done - begun >= _SHARD:
                written.append(_save(folder / _partial(len(written)), model, pending))
                pending, begun = {}, done
            report(done / total)
    _finish(folder, written, total)


def _save(path: Path, model: Any, parameters: dict[str, torch.Tensor]) -> list[str]:
    """Writes some parameters; gives the names that they have in the file."""
    published = revert_weight_conversion(model, parameters)
    tensors = {name: tensor.contiguous() for name, tensor in published.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod((path.parent / "config.json").stat().st_mode)  # else for their owner only, unlike the rest
    return list(tensors)


def _finish(folder: Path, written: list[list[str]], total: int) -> None:
    """Gives the files their names, and writes an index of their tensors if there are several."""
    if len(written) == 1:
        (folder / _partial(0)).replace(folder / "model.safetensors")
        return
    places: dict[str, str] = {}
    for number, names in enumerate(written):
        name = f"model-{number + 1:05d}-of-{len(written):05d}.safetensors"
        (folder / _partial(number)).replace(folder / name)
        places |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _partial(number: int) -> str:
    return f"part-{number}.partial"


def _layer(parameter: Parameter) -> str:
    match = re.match(r"[a-z_.]+\.\d+\.", parameter.name)
    return match[0] if match else parameter.name


def _bytes(parameter: Parameter, dtype: torch.dtype) -> int:
    count = 1
    for size in parameter.shape:
        count *= size
    return count * dtype.itemsize
