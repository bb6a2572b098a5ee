"""Lets Triton programs compute a model's fused layers; see ``server.models.gpu.layer``.

As with the fused layers themselves (``server.models.fuse``), a layer is replaced only after it has computed
the same, here on the very device that is to serve.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from server.models.fuse import Probe, close, watch
from server.models.fused import FusedLayer
from server.models.gpu.layer import TritonLayer

log = logging.getLogger("longspan.models")


def replace_layers(model: Any) -> int:
    """Replaces the fused layers whose Triton form proves equal, in place.

    The others stay, and the log says why: so do all where a program can't be compiled or launched.

    Args:
        model: a causal language model, fused, on the device that it is to run on.

    Returns:
        The number of layers replaced.
    """
    found: dict[FusedLayer, tuple[nn.ModuleList, int]] = {}
    for modules in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        found |= {
            layer: (modules, index) for index, layer in enumerate(modules) if isinstance(layer, FusedLayer)
        }
    if not found:
        return 0
    obstacles = {layer: TritonLayer.obstacle(layer) for layer in found}
    candidates = {layer: TritonLayer(layer).eval() for layer in found if obstacles[layer] is None}
    reasons = {reason for reason in obstacles.values() if reason is not None}
    proven: set[FusedLayer] = set()
    if candidates:
        try:
            proven = _proven(model, candidates)
        except Exception as error:  # compilers and drivers fail in many ways
            reasons.add(f"{type(error).__name__}: {' '.join(str(error).split())}")
        else:
            if len(proven) < len(candidates):
                reasons.add(f"{len(candidates) - len(proven)} computed something else")
    for layer in proven:
        modules, index = found[layer]
        modules[index] = candidates[layer]
    text = "%d of %d fused layers are computed by Triton programs"
    if reasons:
        log.warning(
            f"{text}, the others by torch's operators, slower: %s",
            len(proven),
            len(found),
            "; ".join(sorted(reasons)),
        )
    else:
        log.info(text, len(proven), len(found))
    return len(proven)


def _proven(model: Any, candidates: Mapping[FusedLayer, TritonLayer]) -> set[FusedLayer]:
    """Those that compute what their fused layers do, in one forward of the model on a few tokens."""
    proven = set()
    probe = Probe()
    given: list[Any] = []

    def note(_: nn.Module, args: Any) -> None:
        # A layer changes its input.
        given[:] = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]

    def compare(layer: Any, _: Any, kwargs: dict[str, Any], output: torch.Tensor) -> None:
        expected = probe.last
        own = candidates[layer](*given, **kwargs)
        assert expected is not None
        assert probe.last is not None
        if all(map(close, (*probe.last.tensors, own), (*expected.tensors, output))):
            proven.add(layer)

    watch(model, probe, candidates, note, compare)
    return proven
