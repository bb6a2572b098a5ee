"""The flash-attn packages, which read pages in place; see ``flash_interfaces``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from attention.batch import AttentionBatch
from attention.dtypes import cast
from attention.kernels.base import Kernel, Kind
from attention.kernels.cuda_packages import Lengths, is_installed, refusals, window_of
from attention.kernels.flash_interfaces import INTERFACES, Interface, Part, refusals_of
from attention.patterns.base import Pattern
from attention.transfer import to_device
from attention.types import LayerCache, LayerSpec


class FlashPlan(NamedTuple):
    """The calls of a step in layers of a kind.

    Attributes:
        interface: the package to call.
        parts: one call each.
        features: further arguments of every call.
    """

    interface: Interface
    parts: list[Part]
    features: dict[str, Any]


class FlashAttn(Kernel[FlashPlan]):
    """The first installed interface that can compute the layers."""

    name = "flash_attn"

    def unsupported(
        self,
        layers: list[LayerSpec],
        device: torch.device,
        dtype: torch.dtype,
        page_size: int,
        pattern: Pattern,
    ) -> list[str]:
        """See ``Kernel.unsupported``."""
        reasons = refusals(self.name, layers, device, dtype, pattern, softcap=True, sinks=True)
        installed = [interface for interface in INTERFACES if is_installed(interface.module)]
        if not installed:
            reasons.append(
                "flash_attn is not installed; pip install 'longspan[flash]', or build flash-attn from source"
            )
        lacks = []
        for interface in installed:
            if not (found := refusals_of(interface, layers, device, page_size)):
                return reasons
            lacks += found
        return reasons + lacks

    def plan(self, kind: Kind, batch: AttentionBatch) -> FlashPlan:
        """See ``Kernel.plan``."""
        layer, window = kind.layer, window_of(kind.layer, kind.pattern)
        interface = _interface(layer, batch.device.page_table.device, batch.host.page_size)
        features = {
            "softmax_scale": layer.scale,
            "causal": True,
            # How far a query sees to the left and to the right of itself.
            "window_size": (interface.endless,) * 2 if window is None else (window - 1, 0),
            "softcap": layer.softcap or 0.0,
        }
        return FlashPlan(interface, _parts(batch, interface.mixes), features)

    def forward(
        self,
        layer: LayerSpec,
        query: torch.Tensor,
        cache: LayerCache,
        plan: FlashPlan,
        sinks: torch.Tensor | None,
        rerotated: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See ``Kernel.forward``."""
        interface, query_dtype = plan.interface, query.dtype
        query, features = cast(query, cache.keys.dtype), plan.features
        if interface.sinks is not None:
            features = {**features, interface.sinks: sinks}
        if len(plan.parts) == 1:
            return interface.attend(query, cache, plan.parts[0], features).to(query_dtype)
        output = query.new_empty(query.shape)  # contiguous, which the query need not be
        for part in plan.parts:
            output[part.rows] = interface.attend(query[part.rows], cache, part, features)
        return output.to(query_dtype)


def _interface(layer: LayerSpec, device: torch.device, page_size: int) -> Interface:
    """The first interface that can compute the layer; ``unsupported`` has found that there is one."""
    return next(
        interface
        for interface in INTERFACES
        if is_installed(interface.module) and not refusals_of(interface, [layer], device, page_size)
    )


def _parts(batch: AttentionBatch, mixed: bool) -> list[Part]:
    """All sequences; decodes and chunks in separate parts unless both may be mixed."""
    lens = [batch.host.query_len(b) for b in range(batch.host.size)]
    if mixed or batch.host.decode_only or min(lens) > 1:
        lengths = Lengths.build(lens, batch.host.seq_lens, batch.device.page_table.device)
        return [Part(slice(None), lengths, batch.device.page_table)]
    decodes = [b for b, count in enumerate(lens) if count == 1]
    return [_part(batch, decodes), _part(batch, [b for b, count in enumerate(lens) if count > 1])]


def _part(batch: AttentionBatch, sequences: list[int]) -> Part:
    host, table = batch.host, batch.device.page_table
    rows = [row for b in sequences for row in range(host.query_starts[b], host.query_starts[b + 1])]
    counts = [host.query_len(b) for b in sequences]
    lengths = Lengths.build(counts, [host.seq_lens[b] for b in sequences], table.device)
    own = table[to_device(torch.tensor(sequences), table.device)]
    return Part(to_device(torch.tensor(rows), table.device), lengths, own)
