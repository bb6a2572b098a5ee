"""torch's own flash attention over sequences of different lengths, ``torch.nn.attention.varlen``."""

from __future__ import annotations

from inspect import signature
from typing import Any, NamedTuple

import torch
from torch.nn.attention.varlen import varlen_attn

from attention.batch import AttentionBatch
from attention.dtypes import cast
from attention.kernels.base import Kernel, Kind
from attention.kernels.cuda_packages import Lengths, gather, gathered, refusals, window_of
from attention.patterns.base import Pattern
from attention.types import LayerCache, LayerSpec

# Page sizes that torch's implementation, FlashAttention-2, can read in place.
_PAGE_MULTIPLE = 256


class VarlenPlan(NamedTuple):
    """The call of a step in layers of a kind.

    Attributes:
        window: see ``window_of``.
        page_table: of the step.
        slots: of the keys to gather; ``None`` if pages can be read in place.
        lengths: of the sequences.
    """

    window: int | None
    page_table: torch.Tensor
    slots: torch.Tensor | None
    lengths: Lengths


class Varlen(Kernel[VarlenPlan]):
    """One call for the whole batch, mixed or not; in every torch for CUDA.

    From torch 2.12 on, pages of a multiple of 256 tokens are read in place. Others, and all with torch 2.11,
    are gathered first.
    """

    name = "varlen"

    def unsupported(
        self,
        layers: list[LayerSpec],
        device: torch.device,
        dtype: torch.dtype,
        page_size: int,
        pattern: Pattern,
    ) -> list[str]:
        """See ``Kernel.unsupported``."""
        return refusals(self.name, layers, device, dtype, pattern)

    def plan(self, kind: Kind, batch: AttentionBatch) -> VarlenPlan:
        """See ``Kernel.plan``."""
        window, table = window_of(kind.layer, kind.pattern), batch.device.page_table
        host, sequences = batch.host, range(batch.host.size)
        if not _reads_pages() or host.page_size % _PAGE_MULTIPLE:
            return VarlenPlan(window, table, *gathered(batch, sequences, window))
        counts = [host.query_len(b) for b in sequences]
        return VarlenPlan(window, table, None, Lengths.build(counts, host.seq_lens, table.device))

    def forward(
        self,
        layer: LayerSpec,
        query: torch.Tensor,
        cache: LayerCache,
        plan: VarlenPlan,
        sinks: torch.Tensor | None,
        rerotated: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See ``Kernel.forward``."""
        lengths = plan.lengths
        features: dict[str, Any] = {"seqused_k": lengths.key_lens, "block_table": plan.page_table}
        keys, values = cache.keys, cache.values
        if plan.slots is not None:
            keys, values, features = gather(keys, plan.slots), gather(values, plan.slots), {}
        if _reads_pages():
            features["enable_gqa"] = True
        output: Any = varlen_attn(
            cast(query, keys.dtype),
            keys,
            values,
            lengths.query_starts,
            lengths.key_starts,
            lengths.longest_query,
            lengths.longest_keys,
            scale=layer.scale,
            window_size=_window_size(plan.window, lengths),
            **features,
        )
        return output.to(query.dtype)


def _window_size(window: int | None, lengths: Lengths) -> tuple[int, int]:
    """How far a query sees to the left and to the right of itself; -1: without end."""
    if window is not None:
        return window - 1, 0
    # A last token has nothing to its right, and only without a limit is its sequence split over the GPU.
    return (-1, -1) if lengths.longest_query == 1 else (-1, 0)


def _reads_pages() -> bool:
    """Whether this torch is 2.12 or newer."""
    return "block_table" in signature(varlen_attn).parameters
