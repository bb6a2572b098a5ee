"""Gather from the pages, then torch's ``scaled_dot_product_attention``.

Slots to gather and masks depend only on the step and the kind of layer, so they are planned once for all
layers of a kind; only selections by content are planned in each layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from attention.batch import AttentionBatch
from attention.dtypes import taken, wider
from attention.kernels.base import Kernel, Kind, dtype_refusal, layer_ranges, spans_within
from attention.kernels.plan import Block, Plan, Rows, plan_batch, plan_rows
from attention.patterns.base import ContentPattern, Pattern
from attention.patterns.blocks import KnownRows
from attention.types import LayerCache, LayerSpec

# The most bytes that selecting rows gather at once, and that masks of a block with rerotated queries take.
_GATHER_BYTES = 64 << 20

# Rows that select at once; bounded, since their ranges may be many.
_SELECTING_ROWS = 64


class SelectingPart(NamedTuple):
    """Rows that select by content at once.

    Attributes:
        pattern: the rule of the selection.
        rows: the rows.
        counts: how many tokens each row sees with each KV head, at most; ``None`` if unknown.
    """

    pattern: ContentPattern
    rows: KnownRows
    counts: list[int] | None


class SdpaPlan(NamedTuple):
    """All rows of a step.

    Attributes:
        batch: the step.
        rerotated: see ``Pattern.rerotated``.
        ruled: rows whose ranges follow from a rule over positions.
        selecting: the others.
    """

    batch: AttentionBatch
    rerotated: int
    ruled: Plan
    selecting: list[SelectingPart]


class Sdpa(Kernel[SdpaPlan]):
    """Works on any device and for any pattern."""

    name = "sdpa"

    def unsupported(
        self,
        layers: list[LayerSpec],
        device: torch.device,
        dtype: torch.dtype,
        page_size: int,
        pattern: Pattern,
    ) -> list[str]:
        """See ``Kernel.unsupported``."""
        reasons = []
        if capped := [layer for layer in layers if layer.softcap is not None]:
            reasons.append(f"{self.name} lacks soft-capping ({layer_ranges(capped)})")
        if sinks := [layer for layer in layers if layer.sinks]:
            reasons.append(f"{self.name} lacks learned sinks ({layer_ranges(sinks)})")
        return reasons + dtype_refusal(self.name, dtype)

    def plan(self, kind: Kind, batch: AttentionBatch) -> SdpaPlan:
        """See ``Kernel.plan``; masks are in float32 for patterns that rerotate, as their products are."""
        layer, pattern = kind.layer, kind.pattern
        dtype = torch.float32 if pattern.rerotated else wider(kind.query_dtype, kind.cache_dtype)
        ruled = plan_batch(batch, layer.window, pattern, dtype)
        selecting = _selecting(layer, batch, pattern) if isinstance(pattern, ContentPattern) else []
        return SdpaPlan(batch, pattern.rerotated, ruled, selecting)

    def forward(
        self,
        layer: LayerSpec,
        query: torch.Tensor,
        cache: LayerCache,
        plan: SdpaPlan,
        sinks: torch.Tensor | None,
        rerotated: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See ``Kernel.forward``.

        Computes in the wider dtype of queries and keys. Logits of rerotated queries are added through the
        mask, so these are computed in float32.
        """
        if not plan.rerotated:
            rerotated = None
        dtype = wider(query.dtype, cache.keys.dtype) if rerotated is None else torch.float32
        output = query.new_empty(*query.shape[:2], layer.value_size)
        if plan.selecting:
            _attend_selecting(layer, query, cache, plan, output)
        cast = query.to(dtype)
        rerotated = None if rerotated is None else rerotated.to(dtype)
        for rows in plan.ruled.rows:
            attend_rows(layer, cast, cache, rows, rerotated, output)
        for block in plan.ruled.blocks:
            _attend_block(layer, cast, cache, block, rerotated, output)
        return output


def attend_rows(
    layer: LayerSpec,
    query: torch.Tensor,
    cache: LayerCache,
    rows: Rows,
    rerotated: torch.Tensor | None,
    output: torch.Tensor,
) -> None:
    """Computes a group of single rows.

    Args:
        layer: the layer's spec.
        query: ``[T, H, D]``, in the dtype to compute in.
        cache: the layer's keys and values.
        rows: the group.
        rerotated: see ``Kernel.forward``, in the same dtype.
        output: ``[T, H, Dv]`` in any dtype, filled at the group's rows.
    """
    # The heads that share a KV head are adjacent, as [N, Hkv, G, D], so keys need no expansion.
    shared = layer.kv_heads // rows.heads
    keys = gather(cache.keys, rows.slots, rows.heads).to(query.dtype)
    values = gather(cache.values, rows.slots, rows.heads).to(query.dtype)
    mask = _in(query.dtype, rows.mask)
    if rerotated is not None and rows.near is not None:
        count = rows.near.shape[1]
        first = keys[:, :count]
        logits = torch.einsum("nkgd,nskd->nkgs", _items(rerotated, rows, shared), first) * layer.scale
        mask = query.new_zeros(1) if mask is None else mask
        mask = mask.expand(*logits.shape[:-1], keys.shape[1]).clone(memory_format=torch.contiguous_format)
        mask[..., :count] += logits.where(rows.near[:, None, None], 0)
        first.masked_fill_(rows.near[:, :, None, None], 0)
    result = scaled_dot_product_attention(
        _items(query, rows, shared),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=mask,
        scale=layer.scale,
    )
    output.view(-1, layer.query_heads // rows.heads, layer.value_size)[rows.items] = result.flatten(1, 2).to(
        output.dtype
    )


def _items(query: torch.Tensor, rows: Rows, shared: int) -> torch.Tensor:
    """The queries of ``rows``, ``[N, shared, G, D]``."""
    return query.reshape(len(query) * rows.heads, shared, -1, query.shape[-1])[rows.items]


def _in(dtype: torch.dtype, mask: torch.Tensor | None) -> torch.Tensor | None:
    """The mask in the dtype to compute in; planned for rerotated queries, it is cast if there are none."""
    return mask if mask is None or mask.dtype == dtype else mask.to(dtype)


def gather(pages: torch.Tensor, slots: torch.Tensor, heads: int = 1) -> torch.Tensor:
    """The tokens ``[*slots.shape, Hkv / heads, D]`` of ``pages`` ``[P, page_size, Hkv, D]`` at ``slots``."""
    tokens = pages.view(-1, pages.shape[2] // heads, pages.shape[3])
    return taken(tokens, slots.flatten()).unflatten(0, slots.shape)


def _attend_block(
    layer: LayerSpec,
    query: torch.Tensor,
    cache: LayerCache,
    block: Block,
    rerotated: torch.Tensor | None,
    output: torch.Tensor,
) -> None:
    """Computes consecutive query rows; arguments as in ``attend_rows``."""
    shape = layer.kv_heads, layer.query_heads // layer.kv_heads
    keys = gather(cache.keys, block.slots).to(query.dtype)
    values = gather(cache.values, block.slots).to(query.dtype)
    rows, first = block.stop - block.start, None
    if rerotated is not None and block.near:
        first = keys[: block.near].clone()
        keys[: block.near] = 0
        rows = max(1, _GATHER_BYTES // (len(keys) * layer.query_heads * keys.itemsize))
    for start in range(block.start, block.stop, rows):
        part = slice(start, min(start + rows, block.stop))
        mask = None if block.mask is None else block.mask[start - block.start : part.stop - block.start]
        mask = _in(query.dtype, mask)
        if rerotated is not None and first is not None and mask is not None:
            mask = mask.expand(*shape, -1, -1).clone(memory_format=torch.contiguous_format)
            near = rerotated[part].unflatten(1, shape)
            mask[..., : block.near] += torch.einsum("rkgd,skd->kgrs", near, first) * layer.scale
        result = scaled_dot_product_attention(
            query[part].unflatten(1, shape).permute(1, 2, 0, 3),
            keys.transpose(0, 1)[:, None].expand(-1, shape[1], -1, -1),
            values.transpose(0, 1)[:, None].expand(-1, shape[1], -1, -1),
            attn_mask=mask,
            is_causal=mask is None,
            scale=layer.scale,
        )
        output[part] = result.permute(2, 0, 1, 3).flatten(1, 2)


def _attend_selecting(
    layer: LayerSpec, query: torch.Tensor, cache: LayerCache, plan: SdpaPlan, output: torch.Tensor
) -> None:
    """Computes the rows that select by content; ``query`` in the model's dtype."""
    dtype = wider(query.dtype, cache.keys.dtype)
    cast = query.to(dtype).contiguous()
    most = _GATHER_BYTES // ((layer.head_size + layer.value_size) * dtype.itemsize)
    for pattern, rows, counts in plan.selecting:
        spans = pattern.select(layer, query[rows.rows], rows, cache)
        spans = spans_within(spans, rows.positions, layer.window)
        exact = counts is None or layer.window is None
        groups = plan_rows(plan.batch, rows.known, spans, 0, dtype, counts=counts, exact=exact, most=most)
        for group in groups:
            attend_rows(layer, cast, cache, group, None, output)


def _selecting(layer: LayerSpec, batch: AttentionBatch, pattern: ContentPattern) -> list[SelectingPart]:
    """All rows that select, in parts."""
    host, found = batch.host, []
    every = batch.visible.selecting(pattern)
    for first in range(0, len(every), _SELECTING_ROWS):
        known = every[first : first + _SELECTING_ROWS]
        counts = None
        if pattern.counted_ahead:
            positions = torch.from_numpy(host.positions[known])
            prompt_lens = torch.from_numpy(host.row_prompt_lens[known])
            pages = pattern.pages_selected(positions, prompt_lens, host.page_size)
            tokens = (pages - 1) * host.page_size + positions % host.page_size + 1
            if layer.window is not None:
                tokens = tokens.clamp(max=layer.window)
            counts = tokens.repeat_interleave(layer.kv_heads).tolist()
        found.append(SelectingPart(pattern, KnownRows(host, batch.device, known), counts))
    return found
