"""Notes what transformers does with each tensor of a checkpoint's files while it loads a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, core_model_loading

from server.errors import RefusedError
from server.models.checkpoint.files import Stored, stored_tensors


@dataclass(slots=True)
class Reading:
    """The use that transformers made of the tensors of some files.

    Attributes:
        targets: the place in the model that each tensor's name stands for.
        taken: those that have a place there.
        converted: those that are one of several that a weight is made of.
        missing: places that no tensor was for.
        told: places that the model does not have, without those that its class drops silently.
        failures: weights that could not be made, and why.
        mismatched: weights of another shape: name, shape in the file, shape by the config.
    """

    targets: dict[str, str] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    converted: set[str] = field(default_factory=set)
    missing: set[str] = field(default_factory=set)
    told: set[str] = field(default_factory=set)
    failures: dict[str, str] = field(default_factory=dict)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)


@contextmanager
def noting() -> Iterator[Reading]:
    """Notes, while it lasts, what ``from_pretrained`` does with each tensor."""
    reading = Reading()
    rename = core_model_loading.rename_source_key
    adjust = PreTrainedModel._adjust_missing_and_unexpected_keys

    def note_name(name: str, *args: Any, **kwargs: Any) -> tuple[str, str | None]:
        target, pattern = rename(name, *args, **kwargs)
        places = kwargs.get("meta_state_dict", args[3] if len(args) > 3 else None)
        if places is not None:
            reading.targets[name] = target
            for names, belongs in (
                (reading.taken, target in places),
                (reading.converted, pattern is not None),
            ):
                names.add(name) if belongs else names.discard(name)
        return target, pattern

    def note_result(model: Any, info: Any) -> None:
        reading.missing = set(info.missing_keys)
        reading.failures = dict(info.conversion_errors)
        reading.mismatched = sorted(info.mismatched_keys)
        adjust(model, info)
        reading.told = set(info.unexpected_keys)

    # transformers does not say what its classes drop, nor which tensor a name stands for.
    core_model_loading.rename_source_key = note_name
    PreTrainedModel._adjust_missing_and_unexpected_keys = note_result
    try:
        yield reading
    finally:
        core_model_loading.rename_source_key = rename
        PreTrainedModel._adjust_missing_and_unexpected_keys = adjust


def read_stored(files: Sequence[Path]) -> dict[str, Stored]:
    """All tensors of a checkpoint's files; see ``checkpoint.files.stored_tensors``.

    Raises:
        RefusedError: a file is damaged, holds more than tensors, or two hold the same tensor.
    """
    if files[0].suffix == ".safetensors":
        return stored_tensors(files)
    found: dict[str, Stored] = {}
    for file in files:
        try:
            content = torch.load(file, map_location="meta", weights_only=True)
        except Exception as error:  # pickles break in many ways
            raise RefusedError(
                f"{file} is damaged, or holds more than tensors, which Longspan does not read "
                f"({type(error).__name__}); fetch it again, or save the model as safetensors"
            ) from error
        tensors = content if isinstance(content, dict) else {}
        if not tensors or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
            raise RefusedError(f"{file} is no dictionary of tensors; save the model as safetensors")
        if twice := sorted(found.keys() & tensors):
            raise RefusedError(
                f"{twice[0]} is in both {found[twice[0]].file.name} and {file.name} of {file.parent}, and "
                "only one can be read; fetch the checkpoint again"
            )
        found |= {name: Stored(file, _DTYPES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    return found


class _Names(dict[torch.dtype, str]):
    def __missing__(self, dtype: torch.dtype) -> str:
        return str(dtype).removeprefix("torch.")


_DTYPES = _Names(
    {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    | {torch.int8: "I8", torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}
)
