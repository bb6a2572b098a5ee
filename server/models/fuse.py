"""Replaces decoder layers of the common shape by one lean layer each; see ``server.models.fused``.

Whether a layer is of the common shape is not told by its class but by what it computes: the lean layer takes
its place only if, on the same input, it asks the same of attention and returns the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from attention.forward import Attend, forward
from server.models.fused import FusedLayer, NotCommonError

log = logging.getLogger("longspan.models")

# Of the largest number: orders of magnitude above rounding, and below anything that is computed otherwise.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}

# Near and far, and more than one token at some: rotations by small and large angles.
_POSITIONS = (0, 1, 2, 5, 17, 60, 120)


def fuse(model: Any) -> int:
    """Replaces what can be proven equal, in place; what can't stays as transformers wrote it.

    Args:
        model: a causal language model of transformers whose attention implementation is ``longspan``.

    Returns:
        The number of layers replaced.
    """
    found: dict[nn.Module, tuple[nn.ModuleList, int, FusedLayer]] = {}
    for modules in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for index, layer in enumerate(modules):
            if not hasattr(layer, "self_attn") or hasattr(layer, "_hf_hook"):
                continue
            try:
                found[layer] = modules, index, FusedLayer(layer)
            except (NotCommonError, AttributeError) as error:
                log.debug("layer %d stays as transformers wrote it: %s", index, error)
    proven = _proven(model, {layer: fused for layer, (_, _, fused) in found.items()}) if found else {}
    for layer, fused in proven.items():
        modules, index, _ = found[layer]
        modules[index] = fused.eval()
    return len(proven)


def _proven(model: Any, candidates: Mapping[nn.Module, FusedLayer]) -> dict[nn.Module, FusedLayer]:
    """Those that compute what their plain layers do, in one forward of the model on a few tokens."""
    proven = {}
    probe = Probe()

    def compare(layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        fused, plain_call = candidates[layer], probe.last
        if plain_call is None or not isinstance(output, torch.Tensor):
            return
        fused.features = {
            name: value
            for name, value in plain_call.features.items()
            if value is None or isinstance(value, (bool, int, float, str))
        }
        if fused.features.keys() != plain_call.features.keys() - {"position_ids"}:
            return  # it gives attention tensors of its own, like learned sinks
        try:
            own = fused(*[arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args], **kwargs)
        except (TypeError, ValueError, RuntimeError) as error:  # it calls its layers in another way
            log.debug("layer %d stays as transformers wrote it: %s", fused.layer_idx, error)
            return
        if probe.last is not None and all(
            map(close, (*probe.last.tensors, own), (*plain_call.tensors, output))
        ):
            proven[layer] = fused

    def forget(*_: Any) -> None:
        probe.last = None

    watch(model, probe, candidates, forget, compare)
    return proven


def watch(
    model: Any,
    probe: Probe,
    layers: Iterable[nn.Module],
    before: Callable[..., None],
    after: Callable[..., None],
) -> None:
    """One forward of a model on a few tokens, in which some of its layers are looked at.

    Args:
        model: a causal language model of transformers whose attention implementation is ``longspan``.
        probe: computes attention.
        layers: to look at.
        before: called with a layer and its positional arguments, before the layer computes.
        after: called with a layer, its positional and keyword arguments, and its output.
    """
    hooks = []
    for layer in layers:
        hooks += [
            layer.register_forward_pre_hook(before),
            layer.register_forward_hook(after, with_kwargs=True),
        ]
    try:
        probe_forward(model, probe)
    finally:
        for hook in hooks:
            hook.remove()


def probe_forward(model: Any, attend: Attend) -> torch.Tensor:
    """One forward of a model on a few tokens, near and far from each other; the first token's logits."""
    device = next(model.parameters()).device
    text = model.config.get_text_config(decoder=True)
    most = getattr(text, "max_position_embeddings", None) or max(_POSITIONS) + 1
    positions = torch.tensor([p for p in _POSITIONS if p < most], device=device)
    with torch.inference_mode():
        return forward(
            model,
            (7 * torch.arange(len(positions), device=device) + 1) % text.vocab_size,
            positions,
            attend,
            torch.zeros(1, dtype=torch.long, device=device),
        )


@dataclass(frozen=True, slots=True)
class _Call:
    """What a layer asked of attention."""

    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    features: dict[str, Any] = field(default_factory=dict)


class Probe:
    """Computes plain causal attention and notes the last call."""

    def __init__(self) -> None:
        self.last: _Call | None = None

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        features: Mapping[str, Any],
    ) -> torch.Tensor:
        """See ``attention.forward.Attend.attend``."""
        self.last = _Call((query, key, value), dict(features))
        output = scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=features.get("scaling"), enable_gqa=True
        )
        return output.transpose(1, 2).contiguous()


def close(own: torch.Tensor, plain: torch.Tensor) -> bool:
    """Whether what a layer of ours gives is what it should be, to rounding; NaN never is."""
    if own.shape != plain.shape or own.dtype != plain.dtype:
        return False
    largest = float(plain.abs().max())
    return float((own - plain).abs().max()) <= _TOLERANCE[plain.dtype] * largest
