"""torch's ``scaled_dot_product_attention``, restricted to its flash attention.

That is torch's implementation for CPUs, which takes masks and so all calls of ``sdpa``. On CUDA torch's flash
attention takes no masks; ``varlen`` calls it without.
"""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from attention.kernels.base import layer_ranges
from attention.kernels.sdpa import Sdpa, SdpaPlan
from attention.patterns.base import Pattern
from attention.types import LayerCache, LayerSpec


class SdpaFlash(Sdpa):
    """Like ``sdpa``, but a call that torch would compute in another way fails."""

    name = "sdpa_flash"

    def unsupported(
        self,
        layers: list[LayerSpec],
        device: torch.device,
        dtype: torch.dtype,
        page_size: int,
        pattern: Pattern,
    ) -> list[str]:
        """See ``Kernel.unsupported``."""
        reasons = super().unsupported(layers, device, dtype, page_size, pattern)
        if device.type != "cpu":
            reasons.append(f"sdpa_flash computes on the CPU, not on {device.type}")
        if not pattern.dense:
            reasons.append(f"sdpa_flash cannot compute {pattern.name}")
        if wrong := [layer for layer in layers if layer.value_size != layer.head_size]:
            reasons.append(f"sdpa_flash takes values of the keys' head size only ({layer_ranges(wrong)})")
        return reasons

    def forward(
        self,
        layer: LayerSpec,
        query: torch.Tensor,
        cache: LayerCache,
        plan: SdpaPlan,
        sinks: torch.Tensor | None,
        rerotated: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See ``Kernel.forward``."""
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return super().forward(layer, query, cache, plan, sinks, rerotated)
