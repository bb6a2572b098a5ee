"""Which tensors of a file each parameter of a model is made of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from server.models.gguf.file import GgufFile
from server.models.gguf.row import Row, Rule
from server.models.gguf.transforms import Sizes, Transform

# Tensors that a file can hold as one, and the dimension along which they lie one after the other.
_MERGED = (
    (("attn_q", "attn_k", "attn_v"), "attn_qkv", 0),
    (("ffn_gate_exps", "ffn_up_exps"), "ffn_gate_up_exps", 1),
)


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter, not computed yet.

    Attributes:
        name: in transformers.
        shape: there.
        sources: names of tensors.
        transform: the function that makes it of them.
        sizes: of the model.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    transform: Transform
    sizes: Sizes

    def kinds(self, file: GgufFile) -> set[str]:
        """How the numbers that it is made of are stored."""
        return {file.kind(name) for source in self.sources for name in _stored(file, source)}

    def compute(self, file: GgufFile) -> torch.Tensor:
        """The parameter in float32; zeros where the file has no tensor for it.

        Raises:
            ValueError: the file's tensors are of another shape.
        """
        if not self.sources:
            return torch.zeros(self.shape)
        try:
            parts = [_read(file, source, self.sizes) for source in self.sources]
            made = self.transform(self.sizes, *parts)
        except (RuntimeError, IndexError):
            made = None
        if made is None or _core(made.shape) != _core(self.shape):
            stored = [name for source in self.sources for name in _stored(file, source)]
            shapes = " and ".join(f"{name} {file.shape(name)}" for name in stored)
            raise ValueError(
                f"its tensor {shapes} has another shape than the metadata asks for, which is {self.shape} "
                f"for {self.name} of transformers"
            )
        return made.reshape(self.shape).contiguous()


def plan_parameters(file: GgufFile, row: Row, sizes: Sizes, model: Any) -> list[Parameter]:
    """All parameters of a model, in its order, each with the tensors that it is made of, which are claimed.

    Args:
        file: holds the tensors.
        row: of its architecture.
        sizes: of the model.
        model: of transformers, on any device.

    Raises:
        ValueError: a tensor is missing; the message names it.
    """
    zero = {stem for stems in row.biases.values() for stem in stems}
    plan = []
    for name, tensor in _parameters(model).items():
        rule, prefix, index = _find_rule(row, name)
        sources = tuple(prefix + source for source in rule.sources)
        for source in sources:
            if not file.claim(_stored(file, source)):
                if re.sub(r"^blk\.\d+\.|\.bias$", "", source) in zero and source.endswith(".bias"):
                    sources = ()
                    break
                raise ValueError(
                    f"it has no tensor {source}, which {row.model_type} models of transformers need"
                )
        plan.append(
            Parameter(name, tuple(tensor.shape), sources, rule.transform, replace(sizes, index=index))
        )
    return plan


def _parameters(model: Any) -> dict[str, torch.Tensor]:
    """By name, those that are another one by a second name left out; buffers that are saved included."""
    parameters = dict(model.named_parameters())
    known = {id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)}
    states = model.state_dict(keep_vars=True)
    return parameters | {name: state for name, state in states.items() if id(state) not in known}


def _find_rule(row: Row, name: str) -> tuple[Rule, str, int]:
    """The rule for a parameter, what its sources' names begin with, and its number among its like."""
    match = re.fullmatch(re.escape(row.layers) + r"(\d+)\.(.+)", name)
    if match is None:
        return _lookup(row.model, name, row), "", 0
    inside = match[2]
    number = re.search(r"\.(\d+)(?=\.)", inside)
    if number is not None:
        inside = inside.replace(number[0], ".#")
    return _lookup(row.layer, inside, row), f"blk.{match[1]}.", int(number[1]) if number else 0


def _lookup(rules: Mapping[str, str | Rule], name: str, row: Row) -> Rule:
    found = rules.get(name)
    if isinstance(found, Rule):
        return found
    module, _, kind = name.rpartition(".")
    found = rules.get(module)
    if isinstance(found, Rule):
        return found._replace(sources=tuple(f"{source}.{kind}" for source in found.sources))
    if found is None:
        raise ValueError(f"Longspan does not know where GGUF files keep {name} of {row.model_type} models")
    return Rule((f"{found}.{kind}",))


def _stored(file: GgufFile, name: str) -> tuple[str, ...]:
    """The tensors that hold ``name``: itself, those that it is merged of, or the one that it is part of."""
    if name in file:
        return (name,)
    for parts, merged, _ in _MERGED:
        for part in parts:
            whole = name.replace(f".{part}.", f".{merged}.")
            if whole != name and whole in file:
                return (whole,)
        split = tuple(name.replace(f".{merged}.", f".{part}.") for part in parts)
        if name not in split and all(part in file for part in split):
            return split
    return (name,)


def _read(file: GgufFile, name: str, sizes: Sizes) -> torch.Tensor:
    stored = _stored(file, name)
    if stored == (name,):
        return file.read(name)
    for parts, merged, dimension in _MERGED:
        if f".{merged}." in name:
            return torch.cat([file.read(part) for part in stored], dimension)
        for number, part in enumerate(parts):
            if f".{part}." in name:
                whole = file.read(stored[0])
                lengths = _lengths(merged, whole.shape[dimension], sizes)
                return whole.split(lengths, dimension)[number]
    raise AssertionError(name)


def _lengths(merged: str, total: int, sizes: Sizes) -> list[int]:
    if merged != "attn_qkv":
        return [total // 2, total - total // 2]
    rest = sizes.kv_heads * sizes.head_size
    return [total - 2 * rest, rest, rest]


def _core(shape: tuple[int, ...]) -> list[int]:
    """Without dimensions of one, which files can leave out."""
    return [size for size in shape if size != 1]
