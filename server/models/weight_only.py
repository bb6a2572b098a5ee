"""Linear layers with weights of 8 bits on a GPU, through torchao; activations are not rounded."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn

Form = Literal["int8", "fp8"]

# Numbers of rows of a decode and of a prefill, for which other code may compute a product.
_ROWS = (1, 64)


def obstacle() -> str | None:
    """Why weights can't be packed here; ``None`` if they can."""
    if find_spec("torchao") is None:
        return "on a GPU it needs torchao, which is not installed; pip install 'longspan[torchao]'"
    return None


def replace_weights(linears: Iterable[tuple[str, nn.Linear]], form: Form) -> None:
    """Replaces the weights of linear layers, one after the other, and tries a product of each shape.

    There is a scale for each output. The caller has to compare their results.

    Args:
        linears: with the name of each.
        form: of the weights.

    Raises:
        ValueError: torchao can't pack or multiply a weight; the message says which.
    """
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    make = Int8WeightOnlyConfig if form == "int8" else Float8WeightOnlyConfig
    config = make(set_inductor_config=False)  # nothing is compiled
    tried: set[tuple[int, int, bool]] = set()
    for name, linear in linears:
        shape = linear.in_features, linear.out_features, linear.bias is not None
        try:
            quantize_(linear, config)
            if shape not in tried:
                _try(linear)
        except Exception as error:  # packages and drivers fail in many ways
            reason = " ".join(str(error).split())
            raise ValueError(
                f"torchao fails with {name} ({shape[0]} to {shape[1]}): {type(error).__name__}: {reason}"
            ) from error
        tried.add(shape)


def _try(linear: nn.Linear) -> None:
    weight = linear.weight
    for rows in _ROWS:
        with torch.inference_mode():
            linear(torch.zeros(rows, linear.in_features, dtype=weight.dtype, device=weight.device)).cpu()


def tensors_of(weight: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that a weight consists of: its codes and scales, or itself where it is a plain one."""
    if not hasattr(weight, "__tensor_flatten__"):
        return [weight]
    names, _ = weight.__tensor_flatten__()
    return [part for name in names for part in tensors_of(getattr(weight, name))]


def form_of(module: Any) -> Form | None:
    """The form of a linear layer's weights; ``None`` where ``replace_weights`` did not replace it."""
    if type(module) is not nn.Linear or not hasattr(module.weight, "__tensor_flatten__"):
        return None
    return "int8" if tensors_of(module.weight)[0].dtype == torch.int8 else "fp8"
