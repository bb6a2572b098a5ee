"""The headers of a checkpoint's files, read before a weight is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from server.errors import RefusedError
from server.models.json_file import single

_LONGEST_HEADER = 100_000_000  # safetensors' own bound
_SHARD = re.compile(r"(?:pytorch_)?model-\d+-of-\d+\.(?:safetensors|bin)")


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file.

    Attributes:
        file: which.
        dtype: as safetensors spells it, like ``BF16`` or ``F8_E4M3``.
        shape: its dimensions.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]


def stored_tensors(files: Sequence[Path]) -> dict[str, Stored]:
    """All tensors of some safetensors files, by name.

    Raises:
        RefusedError: a file is damaged, or two files hold a tensor of the same name.
    """
    found: dict[str, Stored] = {}
    for file in files:
        try:
            _check_names(file)
            with safe_open(file, framework="numpy") as opened:
                for name in opened.keys():  # noqa: SIM118 (it is no dictionary)
                    part = opened.get_slice(name)
                    if name in found:
                        raise RefusedError(
                            f"{name} is in both {found[name].file.name} and {file.name} of {file.parent}, "
                            "and only one can be read; fetch the checkpoint again"
                        )
                    found[name] = Stored(file, part.get_dtype(), tuple(part.get_shape()))
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise RefusedError(f"{file} is damaged or incomplete ({error}); fetch it again") from error
    return found


def _check_names(file: Path) -> None:
    """Refuses a header that says one name twice, of which readers take one without a word.

    Raises:
        ValueError: it does, or is no JSON.
    """
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length <= _LONGEST_HEADER:  # else safetensors refuses it
            json.loads(opened.read(length), object_pairs_hook=single)


def check_shards(folder: Path, files: Sequence[Path], index: Sequence[str]) -> None:
    """Refuses files that contradict each other.

    Args:
        folder: of the checkpoint.
        files: those that are going to be read.
        index: names of the tensors that its index lists, if it has one.

    Raises:
        RefusedError: tensors are not where the index says, lie in two files, or lie in a file that would not
            be read.
    """
    read = {file.name for file in files}
    unread = sorted(
        file.name
        for file in folder.glob(f"*{files[0].suffix}")
        if _SHARD.fullmatch(file.name) and file.name not in read
    )
    if unread:
        reader = files[0].name if len(files) == 1 else "its index"
        raise RefusedError(
            f"{folder} holds {unread[0]}{_more(unread)}, of which {reader} says nothing: which weights are "
            "meant can't be told; remove the files that do not belong to the model, or fetch it again"
        )
    if files[0].suffix == ".safetensors":
        stored = stored_tensors(files)
        if lost := sorted(set(index) - stored.keys()):
            raise RefusedError(
                f"the index of {folder} names {lost[0]}{_more(lost)}, which none of its files holds; "
                "fetch the checkpoint again"
            )


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
