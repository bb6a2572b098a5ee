"""A file's metadata, asked for one architecture's keys."""

from __future__ import annotations

from typing import Any

from server.models.gguf.file import GgufFile

_NEEDED: Any = object()


class Reading:
    """A file's keys of the architecture that it names.

    Args:
        file: the file.

    Attributes:
        architecture: as the file calls it.
        file: the file.

    Raises:
        ValueError: it names none.
    """

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        architecture = file.metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise ValueError("it does not say its architecture (general.architecture)")
        self.architecture = architecture

    def get(self, key: str, default: Any = _NEEDED) -> Any:
        """The value of one of the architecture's keys. A list of equal values per layer counts as one.

        Args:
            key: without the architecture's name.
            default: for files that don't have it.

        Raises:
            ValueError: the file does not say it, or says another value for each layer.
        """
        name = f"{self.architecture}.{key}"
        value = self.file.metadata.get(name)
        if value is None:
            if default is _NEEDED:
                raise ValueError(f"it does not say {name}")
            return default
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise ValueError(f"its layers differ in {name}, which Longspan can't serve")
            return value[0]
        return value

    def items(self, key: str) -> Any:
        """The value of a key that may be a list; ``None`` if there is none."""
        return self.file.metadata.get(f"{self.architecture}.{key}")

    def expect(self, key: str, value: Any) -> None:
        """Refuses a file with another value than the one that the architecture is computed with.

        Raises:
            ValueError: it does.
        """
        found = self.get(key, value)
        if found != value:
            raise ValueError(
                f"it says that {self.architecture}.{key} is {found}; Longspan computes it with {value}"
            )

    def has(self, stem: str, suffix: str = "weight") -> bool:
        """Whether any layer has a tensor of this name."""
        layers = self.get("block_count")
        return any(f"blk.{layer}.{stem}.{suffix}" in self.file for layer in range(layers))
