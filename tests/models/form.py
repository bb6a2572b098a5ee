"""A form of a checkpoint, and how small folders are changed into one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.models_zoo import save_tiny

EXACT = "exact"


class Form(NamedTuple):
    """One of them.

    Attributes:
        name: as a table shows it.
        write: writes the folder; where the form is served, returns the model whose logits it must give, made
            by transformers from plain weights.
        expected: ``EXACT``, or a pattern of the sentence that refuses it.
        needs: the package without which the form is refused only for that reason, if any.
    """

    name: str
    write: Callable[[Path], Any]
    expected: str
    needs: str = ""


Tensors = dict[str, torch.Tensor]


def plain(folder: Path) -> Any:
    """The model in a folder, as transformers itself reads it."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def edit_json(file: Path, **values: Any) -> None:
    """Sets values of a JSON object in a file; ``None`` takes one away."""
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edited(
    edit: Callable[[Tensors], Any], kind: str = "llama", config: dict[str, Any] | None = None, **made: Any
) -> Callable[[Path], Any]:
    """Writes a tiny model, then changes its tensors and its config; gives the model as it was before."""

    def write(folder: Path) -> Any:
        model = plain(save_tiny(kind, folder, **made))
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        edit_json(folder / "config.json", **(config or {}))
        return model

    return write


def put(tensors: Tensors, value: float, *places: tuple[int, int]) -> None:
    """Sets numbers of one weight."""
    weight = tensors["model.layers.1.mlp.down_proj.weight"]
    for place in places:
        weight[place] = value


def sharded(
    change: Callable[[Path, dict[str, Any]], Any] | None = None, suffix: str = "safetensors"
) -> Callable[[Path], Any]:
    """Writes a tiny model in two files and an index, and changes those."""

    def write(folder: Path) -> Any:
        model = plain(save_tiny("llama", folder))
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        stem = "model" if suffix == "safetensors" else "pytorch_model"
        weight_map = {}
        for number, half in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
            shard = folder / f"{stem}-0000{number}-of-00002.{suffix}"
            part = {name: tensors[name] for name in half}
            save_file(part, shard, {"format": "pt"}) if suffix == "safetensors" else torch.save(part, shard)
            weight_map |= dict.fromkeys(half, shard.name)
        index = {"metadata": {}, "weight_map": weight_map}
        if change:
            change(folder, index)
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
        return model

    return write
