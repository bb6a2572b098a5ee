"""Computing with a model of 16 bits as if it were one of float32, so that a comparison can be strict."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_SIXTEEN_BIT = (torch.float16, torch.bfloat16)


@contextmanager
def in_float32(*models: nn.Module) -> Iterator[None]:
    """Lets modules compute in float32, with their own weights.

    While a module computes it has a float32 copy of the parameters and buffers that are its own, so that no
    more than one module's, and those around it, are ever there twice. Of embeddings only the rows that are
    looked up are cast. A model of float32 stays as it is.

    A module that computes with another one's weights has them in 16 bits, which fails or rounds: the caller
    must look at the dtype of what comes out.

    Args:
        models: whose modules; each is left as it was found.
    """
    swapped: dict[nn.Module, list[tuple[dict[str, Any], str, Any]]] = {}
    hooks = []

    def widen(module: nn.Module, _: Any) -> None:
        found = swapped.setdefault(module, [])
        forms: tuple[dict[str, Any], ...] = module._parameters, module._buffers
        for tensors in forms:
            for name, tensor in tensors.items():
                if tensor is not None and tensor.dtype in _SIXTEEN_BIT:
                    found.append((tensors, name, tensor))
                    wide = tensor.detach().float()
                    tensors[name] = nn.Parameter(wide, False) if tensors is module._parameters else wide

    def restore(module: nn.Module, *_: Any) -> None:
        for tensors, name, tensor in swapped.pop(module, []):
            tensors[name] = tensor

    def widen_rows(module: nn.Module, args: Any, output: Any) -> Any:
        return output.float() if isinstance(output, torch.Tensor) else output

    for module in {module for model in models for module in model.modules()}:
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if not any(tensor.dtype in _SIXTEEN_BIT for tensor in own):
            continue
        if isinstance(module, nn.Embedding):
            hooks.append(module.register_forward_hook(widen_rows))
            continue
        hooks.append(module.register_forward_pre_hook(widen))
        hooks.append(module.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in list(swapped):
            restore(module)
