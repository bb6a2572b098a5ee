"""xformers' ``memory_efficient_attention`` with its paged biases.

The operator is picked here, since the order of its dispatcher depends on other installed packages. All decode
rows go to its Triton operator, the only one of its own that reads pages in place; it needs the same number of
queries in each sequence. A layer's window makes the bias *gappy*: the keys before it are left out. Chunks of
prompts are gathered and go to its flash operator, whose windows move with the query.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import torch

from attention.batch import AttentionBatch
from attention.dtypes import cast
from attention.kernels.base import Kernel, Kind, layer_ranges, power_of_two
from attention.kernels.cuda_packages import (
    begins,
    capability,
    gather,
    gathered,
    import_refusal,
    is_installed,
    page_size_refusal,
    refusals,
    window_of,
)
from attention.patterns.base import Pattern
from attention.transfer import to_device
from attention.types import LayerCache, LayerSpec

_HEAD_SIZES = (16, 32, 64, 128, 256)

# The Triton operator splits a page into blocks of so many keys.
_PAGE_MULTIPLE = 64


class XformersPart(NamedTuple):
    """Some of the batch's sequences.

    Attributes:
        rows: their query rows, int64 ``[R]``; decode rows may occur more than once.
        slots: of the keys to gather, int64 ``[L]``; ``None``: pages are read in place.
        bias: tells xformers which keys a query sees.
        operator: to compute with.
    """

    rows: torch.Tensor
    slots: torch.Tensor | None
    bias: Any
    operator: Any


class Xformers(Kernel[list[XformersPart]]):
    """Two calls for a batch: one for its decode rows, one for its chunks."""

    name = "xformers"

    def unsupported(
        self,
        layers: list[LayerSpec],
        device: torch.device,
        dtype: torch.dtype,
        page_size: int,
        pattern: Pattern,
    ) -> list[str]:
        """See ``Kernel.unsupported``."""
        reasons = refusals(self.name, layers, device, dtype, pattern)
        if wrong := [layer for layer in layers if layer.head_size not in _HEAD_SIZES]:
            sizes = " and ".join(map(str, sorted({layer.head_size for layer in wrong})))
            reasons.append(
                f"xformers reads pages of head sizes {', '.join(map(str, _HEAD_SIZES))}, not {sizes} "
                f"({layer_ranges(wrong)})"
            )
        reasons += page_size_refusal(self.name, page_size, _PAGE_MULTIPLE)
        if not is_installed("triton"):
            reasons.append("xformers reads pages through triton, which is not installed; pip install triton")
        if not is_installed("xformers"):
            reasons.append("xformers is not installed; pip install 'longspan[xformers]'")
        elif capability(device):
            reasons += import_refusal(self.name, "xformers.ops.fmha") or _lacking()
        return reasons

    def plan(self, kind: Kind, batch: AttentionBatch) -> list[XformersPart]:
        """See ``Kernel.plan``."""
        window, sequences = window_of(kind.layer, kind.pattern), range(batch.host.size)
        decodes = [b for b in sequences if batch.host.query_len(b) == 1]
        chunks = [b for b in sequences if batch.host.query_len(b) > 1]
        parts = [_plan_decodes(batch, decodes, window)] if decodes else []
        return [*parts, _plan_chunks(batch, chunks, window)] if chunks else parts

    def forward(
        self,
        layer: LayerSpec,
        query: torch.Tensor,
        cache: LayerCache,
        plan: list[XformersPart],
        sinks: torch.Tensor | None,
        rerotated: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See ``Kernel.forward``."""
        attend = import_module("xformers.ops.fmha").memory_efficient_attention_forward
        output = query.new_empty(*query.shape[:2], layer.value_size)
        group = layer.query_heads // layer.kv_heads
        grouped = cast(query, cache.keys.dtype).unflatten(1, (layer.kv_heads, group))
        for part in plan:
            keys, values = (
                pages.flatten(0, 1) if part.slots is None else gather(pages, part.slots)
                for pages in (cache.keys, cache.values)
            )
            # [1, tokens, Hkv, G, D], with a KV head expanded to its query heads without a copy.
            result = attend(
                grouped[part.rows][None],
                keys[None, :, :, None].expand(-1, -1, -1, group, -1),
                values[None, :, :, None].expand(-1, -1, -1, group, -1),
                part.bias,
                scale=layer.scale,
                op=part.operator,
            )
            output[part.rows] = result[0].flatten(1, 2).to(query.dtype)
        return output


def _lacking() -> list[str]:
    """The reason, if xformers finds neither torch's flash attention nor another."""
    if import_module("xformers.ops.fmha").flash.FwOp.is_available():
        return []
    return ["xformers finds no flash attention here; see python -m xformers.info"]


def _plan_decodes(batch: AttentionBatch, sequences: list[int], window: int | None) -> XformersPart:
    """Decode rows, on the pages in place.

    Triton compiles the operator anew for each number of sequences and each width of the page table. So both
    are rounded up to powers of two: the first sequence is repeated, and unused pages are added.
    """
    fmha = import_module("xformers.ops.fmha")
    host, device = batch.host, batch.device.page_table.device
    sequences = sequences + sequences[:1] * (power_of_two(len(sequences)) - len(sequences))
    numbers = torch.tensor([sequences, [host.query_starts[b] for b in sequences]])
    which, rows = to_device(numbers, device).unbind()
    columns = batch.device.page_table.shape[1]
    width = power_of_two(columns)
    table = batch.device.page_table.new_zeros(len(sequences), width)
    table[:, :columns] = batch.device.page_table[which]
    counts, lengths = [1] * len(sequences), [host.seq_lens[b] for b in sequences]
    first = begins(host, sequences, window)
    biases = fmha.attn_bias
    if any(first):
        # As if each sequence had a stretch of its own among all keys, as long as its row of the page table.
        stretch = width * host.page_size
        bias = biases.BlockDiagonalCausalWithOffsetGappyKeysMask.from_seqlens(
            counts,
            [*(n * stretch + begin for n, begin in enumerate(first)), len(sequences) * stretch],
            [length - begin for length, begin in zip(lengths, first, strict=True)],
            device=device,
        ).make_paged(table, host.page_size, stretch, biases.PagedBlockDiagonalCausalWithOffsetGappyKeysMask)
    else:
        bias = biases.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
            counts, lengths, table, host.page_size, device=device
        )
    return XformersPart(rows, None, bias, fmha.triton_splitk.FwOp)


def _plan_chunks(batch: AttentionBatch, sequences: list[int], window: int | None) -> XformersPart:
    """Chunks, on their keys gathered one sequence after the other."""
    fmha = import_module("xformers.ops.fmha")
    host, device = batch.host, batch.device.page_table.device
    slots, _ = gathered(batch, sequences, window)
    first = begins(host, sequences, window)
    lens = [host.seq_lens[b] - begin for b, begin in zip(sequences, first, strict=True)]
    blocks = fmha.attn_bias.BlockDiagonalMask.from_seqlens(
        [host.query_len(b) for b in sequences], lens, device=device
    )
    bias = (
        blocks.make_causal_from_bottomright()
        if window is None
        else blocks.make_local_attention_from_bottomright(window)
    )
    rows = [row for b in sequences for row in range(host.query_starts[b], host.query_starts[b + 1])]
    return XformersPart(to_device(torch.tensor(rows), device), slots, bias, fmha.flash.FwOp)
