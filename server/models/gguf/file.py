"""A GGUF file, or a split set of them, whose every key and tensor is accounted for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from server.errors import quoted
from server.models.gguf.parts import find_parts

# The largest vocabularies have 1.3 million, with types, scores and merges.
_MOST_VALUES = 2_000_000
_SPLIT = ("split.no", "split.count", "split.tensors.count")


class Metadata(Mapping[str, Any]):
    """A file's values by key, which remembers the keys that were asked for.

    float32 values are given as the shortest decimals that round to them, which are the numbers that the
    converter read in the model's own config.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = {key: field for key, field in fields.items() if not key.startswith("GGUF.")}
        self._values: dict[str, Any] = {}
        self._read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return self.peek(key)

    def peek(self, key: str) -> Any:
        """The value of a key, which does not count as having asked for it."""
        if key not in self._values:
            field = self._fields[key]
            try:
                value = field.contents()
            except UnicodeDecodeError as error:
                raise ValueError(f"its {key} has text that is not UTF-8 ({quoted(error.object)})") from error
            if field.types == [gguf.GGUFValueType.FLOAT32]:
                value = float(str(np.float32(value)))
            self._values[key] = value
        return self._values[key]

    def __contains__(self, key: object) -> bool:
        if key in self._fields:
            self._read.add(str(key))
        return key in self._fields

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def unread(self) -> list[str]:
        """Keys that were not asked for, in the file's order."""
        return [key for key in self._fields if key not in self._read]


class GgufFile:
    """Metadata and tensors of a model, from one file or from all files of a split set.

    Args:
        file: the file, or any part of a set.

    Attributes:
        path: the file that holds the metadata.
        metadata: its values.

    Raises:
        ValueError: a file is damaged, missing, out of place, or of a form that can't be read.
    """

    def __init__(self, file: Path) -> None:
        paths = find_parts(file)
        readers = [_open(path) for path in paths]
        self.path = paths[0]
        self.metadata = Metadata(readers[0].fields)
        self._tensors: dict[str, Any] = {}
        self._claimed: set[str] = set()
        for number, (path, reader) in enumerate(zip(paths, readers, strict=True)):
            self._check_part(path, Metadata(reader.fields), number, len(paths))
            for tensor in reader.tensors:
                if tensor.name in self._tensors:
                    raise ValueError(f"{path.name} holds the tensor {tensor.name} of another part once more")
                self._tensors[tensor.name] = tensor
        total = {key: self.metadata.get(key) for key in _SPLIT}["split.tensors.count"]
        total = len(self._tensors) if total is None else total
        if total != len(self._tensors):
            raise ValueError(f"its parts hold {len(self._tensors)} of {total} tensors; fetch them again")

    def _check_part(self, path: Path, metadata: Metadata, number: int, count: int) -> None:
        own = (metadata.get("split.no", 0), metadata.get("split.count", 1))
        if own != (number, count):
            raise ValueError(
                f"{path.name} says that it is part {own[0] + 1} of {own[1]}; give the files of a split set "
                "the names that they were published with, and a whole file another name"
            )
        for key in metadata.unread() if number else ():
            if key not in _SPLIT and (key not in self.metadata or self.metadata[key] != metadata[key]):
                raise ValueError(f"{path.name} says something of its own about {key}; fetch the set again")

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, as torch counts dimensions."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def kind(self, name: str) -> str:
        """How a tensor's numbers are stored, by ggml's name."""
        return str(self._tensors[name].tensor_type.name)

    def claim(self, names: tuple[str, ...]) -> bool:
        """Marks tensors as accounted for; false, and nothing is marked, if one is missing."""
        if not all(name in self._tensors for name in names):
            return False
        self._claimed.update(names)
        return True

    def take(self, name: str) -> torch.Tensor:
        """A tensor that is needed at once: claimed and read.

        Raises:
            ValueError: there is none, or how it is stored is unknown.
        """
        if not self.claim((name,)):
            raise ValueError(f"it has no tensor {name}")
        return self.read(name)

    def read(self, name: str) -> torch.Tensor:
        """A tensor's exact values in float32.

        Raises:
            ValueError: how it is stored is unknown.
        """
        tensor = self._tensors[name]
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"its tensor {name} is stored as {tensor.tensor_type.name}, which Longspan can't read"
            ) from error
        if tensor.tensor_type == gguf.GGMLQuantizationType.F32:  # these still lie in the file
            values = values.copy()
        return torch.from_numpy(values).reshape(self.shape(name))

    def unclaimed(self) -> list[str]:
        """Names of the tensors that are not accounted for, in the file's order."""
        return [name for name in self._tensors if name not in self._claimed]

    def claimed(self) -> list[str]:
        """Names of the others."""
        return [name for name in self._tensors if name in self._claimed]


class _Reader(gguf.GGUFReader):  # type: ignore[misc]  # the package has no types
    """The package's reader, which takes what lies beyond the end of a file for lists of any length.

    It makes an object for each value of a list, hundreds of bytes large, whatever the value's own size.
    """

    _values = 0

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        self._count()
        return super()._get_field_parts(orig_offs, raw_type)

    def _get_tensor_info_field(self, orig_offs: int) -> Any:
        self._count()
        return super()._get_tensor_info_field(orig_offs)

    def _count(self) -> None:
        self._values += 1
        if self._values > _MOST_VALUES:
            raise ValueError(f"it has more than {_MOST_VALUES:,} values, and no model needs so many")

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        found = super()._get(offset, dtype, count, override_order)
        if len(found) != count:
            raise ValueError("it ends too early")
        return found


def _open(path: Path) -> Any:
    try:
        reader = _Reader(str(path))
    except Exception as error:  # a file that is cut short fails in many ways
        reason = str(error)
        if "GGMLQuantizationType" in reason:
            raise ValueError(
                f"{path.name} has tensors of a type that this version of the gguf package does not know "
                f"({reason}); upgrade it: pip install -U gguf"
            ) from error
        if "version" in reason:
            raise ValueError(f"{path.name}: {reason}; fetch a newer file") from error
        raise ValueError(f"{path.name} is cut short or damaged ({reason}); fetch it again") from error
    if reader.byte_order != "I":
        raise ValueError(f"{path.name} has the byte order of another kind of processor")
    begin, alignment = int(reader.data_offset), int(reader.alignment)
    for tensor in reader.tensors:  # llama.cpp demands the same
        if tensor.data_offset != begin:
            raise ValueError(
                f"{path.name} is damaged (its tensor {tensor.name} does not begin where the one before "
                "ends); fetch it again"
            )
        begin += -(-tensor.n_bytes // alignment) * alignment
    return reader
