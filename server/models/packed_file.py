"""Tensors and a description in one file that is written whole, checked as a whole, and memory-mapped.

The format is safetensors', with the description and a SHA-256 of everything among its metadata. Each tensor
begins at a multiple of 64 bytes from the file's start, where the sizes of those before it allow.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

_DESCRIPTION, _DIGEST = "longspan", "sha256"
_ALIGNMENT = 64
# A header that claims to be longer is none.
_LONGEST_HEADER = 1 << 26
_DTYPES = {"U8": torch.uint8, "F16": torch.float16, "F32": torch.float32}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class BrokenFileError(Exception):
    """A file is not what was written; the message says what is wrong with it."""


def write(path: Path, description: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Replaces ``path`` by a new file as a whole; other processes see the old one until then.

    Args:
        path: the file; folders are made where they are missing.
        description: what JSON can say.
        tensors: uint8, float16 or float32, on the CPU.

    Raises:
        OSError: the file can't be written.
    """
    # Those whose sizes are multiples of the alignment first, then by the alignment that they need at least.
    ordered = sorted(
        tensors.items(), key=lambda item: (item[1].nbytes % _ALIGNMENT > 0, -item[1].itemsize, item[0])
    )
    layout, end = {}, 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        layout[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    said = json.dumps(description)
    digest = _begin(said, layout)
    parts = [tensor.detach().contiguous().numpy().data for _, tensor in ordered if tensor.numel()]
    for part in parts:
        digest.update(part)
    metadata = {_DESCRIPTION: said, _DIGEST: digest.hexdigest()}
    header = json.dumps({"__metadata__": metadata, **layout}).encode()
    header += b" " * (-(8 + len(header)) % _ALIGNMENT)

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            with partial.open("wb") as file:
                file.write(len(header).to_bytes(8, "little") + header)
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The description and the tensors that were written; the tensors lie in a private map of the file.

    Raises:
        FileNotFoundError: there is no such file.
        BrokenFileError: it is not what was written.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _LONGEST_HEADER:
                raise BrokenFileError("it has no header")
            layout = json.loads(file.read(length))
            content = np.memmap(file, np.uint8, mode="c", offset=8 + length)
        metadata = layout.pop("__metadata__")
        digest = _begin(metadata[_DESCRIPTION], layout)
        digest.update(content)
        if digest.hexdigest() != metadata[_DIGEST]:
            raise BrokenFileError("its content is not what was written")
        description: dict[str, Any] = json.loads(metadata[_DESCRIPTION])
        return description, {name: _tensor(content, about) for name, about in layout.items()}
    except FileNotFoundError:
        raise
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BrokenFileError(f"it can't be read: {error}") from error


def _tensor(content: np.ndarray[Any, Any], about: Mapping[str, Any]) -> torch.Tensor:
    start, end = about["data_offsets"]
    if start == end:
        return torch.empty(about["shape"], dtype=_DTYPES[about["dtype"]])
    return torch.from_numpy(content[start:end]).view(_DTYPES[about["dtype"]]).view(about["shape"])


def _begin(description: str, layout: Mapping[str, Any]) -> Any:
    return hashlib.sha256(f"{description}\n{json.dumps(layout)}\n".encode())
