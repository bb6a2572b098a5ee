"""Packs a model's linear layers into few bits.

For the CPU see ``server.models.quantized``, for a GPU ``server.models.weight_only``.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast

import torch
from torch import nn

from attention.kernels.cpu.native import NativeError
from server.errors import RefusedError
from server.models.prove_packed import prove_linear
from server.models.quantized import native
from server.models.quantized.linear import QuantizedLinear
from server.models.quantized.packing import Bits, Packed, pack, pack_exactly
from server.models.weight_only import Form, form_of, replace_weights
from server.models.weight_only import obstacle as weight_only_obstacle

log = logging.getLogger("longspan.models")

Weights = Literal["auto", "float", "int8", "int4", "fp8"]

# Forms that a device has no operators for, and the forms in their place.
_ELSEWHERE = {("cpu", "fp8"): "int8", ("cuda", "int4"): "int8 or fp8"}

# Layers that route tokens to experts: an error there routes them elsewhere.
_ROUTERS = ("gate", "router", "shared_expert_gate")


def check_form(weights: Weights, device: str) -> None:
    """Refuses forms that a kind of device can't compute with, before a model is loaded.

    Args:
        weights: which.
        device: ``cpu`` or ``cuda``.

    Raises:
        RefusedError: another form is for this device, or a package is missing; the sentence says which.
    """
    if instead := _ELSEWHERE.get((device, weights)):
        raise RefusedError(
            f"--weights {weights} is not for {device}; choose --weights {instead}, or float for exact weights"
        )
    if device == "cuda" and weights not in ("auto", "float") and (reason := weight_only_obstacle()):
        raise RefusedError(f"--weights {weights}: {reason}; choose --weights float")


def is_packed(weights: str) -> bool:
    """Whether weights in this form, as ``quantize`` returns it, are packed."""
    return "int" in weights or "fp8" in weights


def quantize(model: Any, weights: Weights) -> str:
    """Packs the linear layers that can be packed, each in its place; weights that are packed are freed.

    Models that ``pack_model`` packs as a whole do not come here.

    On a CPU ``auto`` packs where it loses nothing of the weights: those published in groups of 4 or 8 bits.
    ``int8`` rounds weights by groups of 32 to 8 bits, ``int4`` to 4 bits and the output layer to 8, except
    where their numbers are exactly of fewer bits. Before packed weights, activations are rounded to 8 bits by
    groups.

    On a GPU ``auto`` packs nothing. ``int8`` and ``fp8`` round weights with a scale for each output, those of
    the output layer included: where it shares its weights with the embedding, that one keeps them as they
    are. Activations are not rounded.

    Args:
        model: a causal language model of transformers, with or without lean layers.
        weights: which.

    Returns:
        The form of the weights inside the decoder now, like ``int4`` or ``float32``.

    Raises:
        RefusedError: the form is not possible here, or a packed layer computes something else than its
            weights do; the sentence says why.
    """
    check_form(weights, model.device.type)
    reason, done = None if weights == "float" else obstacle(model, weights), ""
    if reason is None and weights != "float":
        try:
            if model.device.type == "cpu":
                done = _pack(model, weights)
            else:
                replace_weights(((name, linear) for _, name, linear in _linears(model)), cast(Form, weights))
        except ValueError as error:
            reason = str(error)
    forms = _forms(model)
    if reason is None and weights not in ("auto", "float") and not is_packed(forms):
        reason = f"{type(model).__name__} has no linear layers that can be packed"
    if reason is not None and weights != "auto":
        raise RefusedError(f"--weights {weights}: {reason}; choose --weights float")
    log.info(
        "weights are %s, those of the output layer %s%s",
        forms,
        _form(model.get_output_embeddings()),
        f": {reason or done}" if reason or done else "",
    )
    return forms


def obstacle(model: Any, weights: Weights) -> str | None:
    """Why nothing can be packed here; ``None`` if something can."""
    if model.device.type != "cpu":
        if weights == "auto":
            return f"on {model.device.type} they are packed where int8 or fp8 is asked for"
        return None
    if model.dtype != torch.float32:
        return f"packed weights go with --dtype float32, not with {_name(model.dtype)}"
    try:
        native.check()
    except NativeError as error:
        return f"the operator for packed weights cannot be compiled: {error}"
    return None


def _pack(model: Any, weights: Weights) -> str:
    """Packs on a CPU; returns how many linear layers got which form, and why."""
    head = model.get_output_embeddings()
    done: list[QuantizedLinear] = []
    kept = 0
    for parent, name, linear in list(_linears(model)):
        packed = packed_weights(linear.weight, weights, is_head=linear is head)
        if packed is None:
            kept += 1
            continue
        quantized = QuantizedLinear(packed, linear.in_features, linear.out_features, linear.bias)
        prove_linear(linear.weight, linear.bias, quantized)
        setattr(parent, name, quantized)
        done.append(quantized)
    said = [said_of(done, kept)] if done or kept else []
    if others := _others(model):
        said.append(f"never packed: {', '.join(others)}")
    return f"of its linear layers {', '.join(said)}" if done or kept else "; ".join(said)


def said_of(packed: Sequence[QuantizedLinear], kept: int) -> str:
    """How many linear layers are packed in how many bits, how many are rounded, and how many stay floats."""
    counts = Counter(linear.bits for linear in packed)
    said = [f"{count} packed in {bits} bits" for bits, count in sorted(counts.items())]
    if rounded := sum(not linear.exact for linear in packed):
        said.append(f"{rounded} of these rounded")
    if kept:
        said.append(
            f"{kept} left in float32, as groups of 32 in 4 or 8 bits don't hold their weights exactly "
            "(--weights int8 rounds them)"
        )
    return ", ".join(said)


def _others(model: Any) -> list[str]:
    """Kinds of modules with matrices that are never packed: routers and experts, for example."""
    known = {id(linear) for *_, linear in _linears(model)}
    found = {
        type(module).__name__ if type(module) is not nn.Linear else name.rpartition(".")[2]
        for name, module in model.named_modules()
        if id(module) not in known and not isinstance(module, nn.Embedding | QuantizedLinear)
        if any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))
    }
    return sorted(found)


def _linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    # By number and by name, so that nothing here holds on to weights that are replaced.
    for parent in model.modules():
        for name in [name for name, _ in parent.named_children()]:
            child = getattr(parent, name)
            # A class derived from Linear computes something else.
            if type(child) is nn.Linear and name not in _ROUTERS:
                yield parent, name, child


def packed_weights(weight: torch.Tensor, weights: Weights, *, is_head: bool) -> Packed | None:
    """The fewest bits that ``weights`` allows; ``None`` where ``auto`` would have to round.

    Args:
        weight: ``[N, K]``, floats on the CPU.
        weights: how to pack.
        is_head: it is the output layer's.

    Raises:
        ValueError: they can't be packed.
    """
    forms: tuple[Bits, Bits] = (4, 8)
    for bits in forms:
        if (packed := pack_exactly(weight, bits)) is not None:
            return packed
    if weights == "auto":
        return None
    return pack(weight, 4 if weights == "int4" and not is_head else 8)


def _forms(model: Any) -> str:
    head = model.get_output_embeddings()
    found = {
        _form(module)
        for module in model.modules()
        if module is not head and not isinstance(module, nn.Embedding)
        if isinstance(module, QuantizedLinear) or any(p.ndim > 1 for p in module.parameters(recurse=False))
    }
    return "+".join(sorted(found))


def _form(module: Any) -> str:
    if isinstance(module, QuantizedLinear):
        return f"int{module.bits}"
    if (form := form_of(module)) is not None:
        return form
    return _name(next(parameter for parameter in module.parameters(recurse=False)).dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
