"""Computes what follows a linear layer in the same native call, where a forward proves that this is the same.

What a module computes is told neither by its class nor by its name: it is called, and what takes its place
has to return the same for the same arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from server.models.encoders.float_linear import NativeLinear, NormedSum

# Share of the largest number: above rounding, and below anything that is computed otherwise.
_TOLERANCE = 1e-5


class _Call(NamedTuple):
    """A module's call in a forward.

    Attributes:
        args: copies, since a model may write to the tensors later.
        named: keyword arguments.
        output: what it returned, a copy.
    """

    args: tuple[Any, ...]
    named: dict[str, Any]
    output: Any


@torch.inference_mode()
def fuse(base: Any, text: list[int]) -> str:
    """Fuses GELU with the linear layer before it, and LayerNorm with a sum and the linear layer before that.

    Args:
        base: a model below its head, with attention of transformers, whose linear layers are
            ``NativeLinear``.
        text: token ids, with which the model is called.

    Returns:
        How many of each, part of a sentence.
    """
    sums = {module: found for module in base.modules() if (found := _normed_sum(module)) is not None}
    gelus = [found for module in base.modules() for found in _linears_with_gelu(module)]
    parents = {parent for parent, *_ in gelus}
    with _noting(base, {*sums, *parents}, {linear for _, linear, _ in gelus}) as (calls, before):
        base(input_ids=torch.tensor([text], device=base.device))
    normed = 0
    for parent in list(base.modules()):
        for name, child in list(parent.named_children()):
            if child in sums and _returns_same(sums[child], calls.get(child)):
                setattr(parent, name, sums[child])
                normed += 1
    applied = sum(
        _apply_gelu(parent, linear, name, calls.get(parent))
        for parent, linear, name in gelus
        if before.get(getattr(parent, name)) is linear
    )
    return f"{applied} with GELU and {normed} with residual and LayerNorm in the same call"


def _normed_sum(module: nn.Module) -> NormedSum | None:
    """What may compute the same as a module of a linear layer and a LayerNorm."""
    children = [child for child in module.children() if not isinstance(child, nn.Dropout | nn.Identity)]
    linears = [child for child in children if type(child) is NativeLinear]
    norms = [child for child in children if type(child) is nn.LayerNorm]
    if (len(children), len(linears), len(norms)) != (2, 1, 1) or next(
        module.parameters(False), None
    ) is not None:
        return None
    (linear,), (norm,) = linears, norms
    whole = norm.normalized_shape == (linear.out_features,) and norm.bias is not None
    return NormedSum(linear, norm) if whole else None


def _linears_with_gelu(module: nn.Module) -> Iterator[tuple[nn.Module, NativeLinear, str]]:
    """Pairs of a linear layer and GELU below a module: the module, the layer, and GELU's name."""
    linears = [child for child in module.children() if type(child) is NativeLinear]
    for name, child in module.named_children():
        if linears and _is_gelu(child):
            yield from ((module, linear, name) for linear in linears)


def _is_gelu(module: nn.Module) -> bool:
    """Whether a module without weights and parts computes GELU by the error function."""
    if (
        isinstance(module, nn.Dropout)
        or next(module.children(), None)
        or next(module.parameters(), None) is not None
    ):
        return False
    numbers = torch.linspace(-6, 6, 97)
    try:
        return torch.equal(module(numbers), nn.functional.gelu(numbers))
    except (
        TypeError,
        ValueError,
        RuntimeError,
        AttributeError,
        NotImplementedError,
    ):  # no function of numbers
        return False


@contextmanager
def _noting(
    base: nn.Module, modules: set[nn.Module], linears: set[nn.Module]
) -> Iterator[tuple[dict[nn.Module, _Call], dict[nn.Module, nn.Module]]]:
    """Notes the first calls of modules, and the linear layer that made the input of those that follow one."""
    calls: dict[nn.Module, _Call] = {}
    before: dict[nn.Module, nn.Module] = {}
    given: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    last: list[Any] = [None, None]  # a linear layer and its output, kept so that its id is no other tensor's

    def enter(module: nn.Module, args: Any, named: dict[str, Any]) -> None:
        if module in modules:
            given[module] = _copy(args), _copy(named)
        if args and args[0] is last[1]:
            before.setdefault(module, last[0])

    def leave(module: nn.Module, args: Any, named: dict[str, Any], output: Any) -> None:
        if module in modules and module in given:
            calls.setdefault(module, _Call(*given.pop(module), _copy(output)))
        if module in linears:
            last[:] = module, output

    hooks = [
        hook
        for module in base.modules()
        for hook in (
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave, with_kwargs=True),
        )
    ]
    try:
        yield calls, before
    finally:
        for hook in hooks:
            hook.remove()


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, tuple):
        return tuple(map(_copy, value))
    return {name: _copy(each) for name, each in value.items()} if isinstance(value, dict) else value


def _returns_same(module: nn.Module, call: _Call | None) -> bool:
    """Whether a module returns for the arguments of a call what the call returned."""
    if call is None:
        return False
    try:
        output = module(*_copy(call.args), **_copy(call.named))
    except (TypeError, ValueError, RuntimeError):  # it is called in another way
        return False
    if isinstance(output, tuple) and isinstance(call.output, tuple) and output and call.output:
        output, expected = output[0], call.output[0]
    else:
        expected = call.output
    if not isinstance(output, torch.Tensor) or not isinstance(expected, torch.Tensor):
        return False
    if output.shape != expected.shape:
        return False
    return bool((output - expected).abs().max() <= _TOLERANCE * expected.abs().max())


def _apply_gelu(parent: nn.Module, linear: NativeLinear, name: str, call: _Call | None) -> bool:
    own = getattr(parent, name)
    linear.gelu = True
    setattr(parent, name, nn.Identity())
    if not _returns_same(parent, call):
        linear.gelu = False
        setattr(parent, name, own)
        return False
    return True
