"""Recognizes decoder layers of the common shape; see ``server.models.fused``.

Whether a layer is of the common shape is not told by its class but by what it computes: on the same input, in
float32, the lean layer has to ask the same of attention and to return the same.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from attention.forward import LayerCall, forward
from server.models.fused import FusedLayer, NotCommonError
from server.models.in_float32 import in_float32

log = logging.getLogger("longspan.models")

# Share of the largest number: orders of magnitude above rounding, and below anything that is computed
# otherwise. A model that does not compute in float32 keeps its own dtype's.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}

# Near and far, and more than one token at some: rotations by small and large angles.
_POSITIONS = (0, 1, 2, 5, 17, 60, 120)


class Recognized(NamedTuple):
    """A decoder layer and the lean layer that computes the same.

    Attributes:
        holder: the list that it is in.
        place: where in it.
        fused: the lean layer.
        input: what the model gave it, ``[1, T, C]``.
        output: what it gave, ``[1, T, C]``.
        angles: cosines and sines ``[1, T, D]`` that the model gave it.
    """

    holder: nn.ModuleList
    place: int
    fused: FusedLayer
    input: torch.Tensor
    output: torch.Tensor
    angles: tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Recognition:
    """A model's forward over a few tokens.

    Attributes:
        layers: those that were recognized, in the order in which they ran.
        ids: of the tokens, int64 ``[T]``.
        positions: int64 ``[T]``.
        logits: of the first token, ``[1, V]``.
    """

    layers: list[Recognized]
    ids: torch.Tensor
    positions: torch.Tensor
    logits: torch.Tensor


def recognize_layers(model: Any) -> Recognition:
    """Finds the decoder layers of the common shape, in one forward of the model; none is replaced.

    Args:
        model: a causal language model of transformers whose attention implementation is ``longspan``.
    """
    candidates: dict[nn.Module, tuple[nn.ModuleList, int, FusedLayer]] = {}
    for modules in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for index, layer in enumerate(modules):
            if not hasattr(layer, "self_attn") or hasattr(layer, "_hf_hook"):
                continue
            try:
                candidates[layer] = modules, index, FusedLayer(layer).eval()
            except (NotCommonError, AttributeError) as error:
                log.debug("layer %d stays as transformers wrote it: %s", index, error)
    return _proven(model, candidates)


def fuse(recognition: Recognition) -> None:
    """Puts the lean layers into the places of those that were recognized."""
    for each in recognition.layers:
        each.holder[each.place] = each.fused


def _proven(model: Any, candidates: Mapping[nn.Module, tuple[nn.ModuleList, int, FusedLayer]]) -> Recognition:
    """The lean layers that compute what their plain layers do."""
    proven: list[Recognized] = []
    probe = Probe()
    given: list[torch.Tensor] = []

    def before(layer: nn.Module, args: Any) -> None:
        probe.last = None
        given[:] = [arg.clone() for arg in args[:1] if isinstance(arg, torch.Tensor)]

    def compare(layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        (holder, index, fused), plain_call = candidates[layer], probe.last
        angles = kwargs.get("position_embeddings")
        if plain_call is None or not given or angles is None or not isinstance(output, torch.Tensor):
            return
        fused.features = {
            name: value
            for name, value in plain_call.features.items()
            if value is None or isinstance(value, (bool, int, float, str))
        }
        if fused.features.keys() != plain_call.features.keys() - {"position_ids"}:
            return  # it gives attention tensors of its own, like learned sinks
        try:
            own = fused(given[0].clone(), *args[1:], **kwargs)
        except (TypeError, ValueError, RuntimeError) as error:  # it calls its layers in another way
            log.debug("layer %d stays as transformers wrote it: %s", fused.layer_idx, error)
            return
        if probe.last is not None and all(
            map(close, (*probe.last.tensors, own), (*plain_call.tensors, output))
        ):
            proven.append(Recognized(holder, index, fused, given[0], output.clone(), angles))

    hooks = []
    for layer in candidates:
        hooks += [
            layer.register_forward_pre_hook(before),
            layer.register_forward_hook(compare, with_kwargs=True),
        ]
    ids, positions = _tokens(model)
    first = torch.zeros(1, dtype=torch.long, device=ids.device)
    try:
        with torch.inference_mode(), in_float32(model, *(fused for *_, fused in candidates.values())):
            logits = forward(model, ids, positions, probe, first)
    except RuntimeError:
        if model.dtype == torch.float32:
            raise
        log.warning(
            "%s does not compute in float32: its layers are recognized in its own dtype, which shows less",
            type(model).__name__,
            exc_info=log.isEnabledFor(logging.DEBUG),
        )
        proven.clear()
        with torch.inference_mode():
            logits = forward(model, ids, positions, probe, first)
    finally:
        for hook in hooks:
            hook.remove()
    return Recognition(proven, ids, positions, logits)


def _tokens(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A few tokens and their positions, near and far from each other."""
    device = next(model.parameters()).device
    text = model.config.get_text_config(decoder=True)
    most = getattr(text, "max_position_embeddings", None) or max(_POSITIONS) + 1
    positions = torch.tensor([p for p in _POSITIONS if p < most], device=device)
    return (7 * torch.arange(len(positions), device=device) + 1) % text.vocab_size, positions


@dataclass(frozen=True, slots=True)
class _Call:
    """A layer's call of attention."""

    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    features: dict[str, Any] = field(default_factory=dict)


class Probe:
    """Computes plain causal attention and notes the last call."""

    def __init__(self) -> None:
        self.last: _Call | None = None

    def attend(self, call: LayerCall) -> torch.Tensor:
        """See ``attention.forward.Attend.attend``."""
        _, query, key, value, _, features = call
        self.last = _Call((query, key, value), dict(features))
        output = scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=features.get("scaling"), enable_gqa=True
        )
        return output.transpose(1, 2).contiguous()


def close(own: torch.Tensor, plain: torch.Tensor) -> bool:
    """Whether a lean layer's tensor equals the expected one, to rounding; NaN never does."""
    if own.shape != plain.shape or own.dtype != plain.dtype:
        return False
    largest = float(plain.abs().max())
    return float((own - plain).abs().max()) <= _TOLERANCE[plain.dtype] * largest
