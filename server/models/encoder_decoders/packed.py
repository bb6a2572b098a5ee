"""Packs the linear layers of an encoder-decoder into few bits, on a CPU."""

from __future__ import annotations

from typing import Any

from server.models.quantize import Weights, quantize
from server.models.quantized.linear import QuantizedLinear


def pack_linears(model: Any, weights: Weights) -> str:
    """Packs them as ``quantize`` does, which proves each against its weights.

    Args:
        model: an encoder-decoder of transformers on a CPU, its linear layers torch's own.
        weights: ``int8`` or ``int4``.

    Returns:
        The form of the weights now.

    Raises:
        RefusedError: they can't be packed so.
    """
    form = quantize(model, weights)
    for module in model.modules():
        if type(module) is QuantizedLinear:
            module.__class__ = _WithoutWeight
    return form


class _WithoutWeight(QuantizedLinear):
    """T5's layers look at the dtype of a weight in each step, for which it would be unpacked each time."""

    weight = None  # type: ignore[assignment]
