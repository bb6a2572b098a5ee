"""Gather from the pages, then torch's ``scaled_dot_product_attention``.

What to gather and which masks to use depends on the batch, the pattern and the layer's window only, so it is
planned once per batch and shared by layers that agree; only what a pattern chooses by content is planned for
each layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from attention.formats import taken, wider
from attention.kernels.base import Kernel, choosing_rows, format_refusal, layer_ranges, spans_within
from attention.kernels.plan import Block, Plan, Rows, plan_batch, plan_rows
from attention.patterns.base import ContentPattern, Pattern
from attention.transfer import to_device
from attention.types import AttentionBatch, LayerCache, LayerSpec

# What rows that choose by content may gather at once, and the masks of a block with rerotated queries take.
_GATHER_BYTES = 64 << 20

# Rows whose choice is made at once, since their ranges may be many.
_CHOOSING_ROWS = 64


class Sdpa(Kernel):
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
        return reasons + format_refusal(self.name, dtype)

    def forward(
        self,
        layer: LayerSpec,
        query: torch.Tensor,
        cache: LayerCache,
        batch: AttentionBatch,
        pattern: Pattern,
        sinks: torch.Tensor | None,
        rerotated: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See ``Kernel.forward``.

        Computes in the format that holds queries and keys alike. Logits of rerotated queries go through the
        mask, so these are computed in float32 throughout.
        """
        if not pattern.rerotated:
            rerotated = None
        dtype = wider(query.dtype, cache.keys.dtype) if rerotated is None else torch.float32
        key = (self.name, layer.window, pattern, dtype)
        plan: Plan = batch.plan(key, lambda: plan_batch(batch, layer.window, pattern, dtype))
        output = query.new_empty(*query.shape[:2], layer.value_size)
        if isinstance(pattern, ContentPattern):
            _attend_choosing(layer, query, cache, batch, pattern, output)
        cast = query.to(dtype)
        rerotated = None if rerotated is None else rerotated.to(dtype)
        for rows in plan.rows:
            attend_rows(layer, cast, cache, rows, rerotated, output)
        for block in plan.blocks:
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
    """Computes a group of query rows that stand alone.

    Args:
        layer: what the layer asks for.
        query: ``[T, H, D]``, in the dtype to compute in.
        cache: the layer's keys and values.
        rows: the group.
        rerotated: see ``Kernel.forward``, in the same dtype.
        output: ``[T, H, Dv]``, where the results go, in any dtype.
    """
    # The heads that share a KV head lie together, as [N, Hkv, G, D], so keys need no expansion.
    shared = layer.kv_heads // rows.heads
    keys = gather(cache.keys, rows.slots, rows.heads).to(query.dtype)
    values = gather(cache.values, rows.slots, rows.heads).to(query.dtype)
    mask = rows.mask
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


def _attend_choosing(
    layer: LayerSpec,
    query: torch.Tensor,
    cache: LayerCache,
    batch: AttentionBatch,
    pattern: ContentPattern,
    output: torch.Tensor,
) -> None:
    """Computes the rows that choose by content; ``query`` as the model gave it."""
    dtype = wider(query.dtype, cache.keys.dtype)
    cast = query.to(dtype).contiguous()
    most = _GATHER_BYTES // ((layer.head_size + layer.value_size) * dtype.itemsize)
    key = ("choosing in parts", pattern, layer.window, layer.kv_heads)
    parts: list[_Part] = batch.plan(key, lambda: _parts(layer, batch, pattern))
    for rows, at, counts in parts:
        spans = pattern.select(layer, query[at], rows, cache, batch)
        spans = spans_within(spans, batch.positions[at], layer.window)
        exact = counts is None or layer.window is None
        for group in plan_rows(batch, rows, spans, 0, dtype, counts=counts, exact=exact, most=most):
            attend_rows(layer, cast, cache, group, None, output)


class _Part(NamedTuple):
    """Rows that choose by content."""

    rows: torch.Tensor  # [N] of the batch's query rows, on the host
    at: torch.Tensor  # the same on the device
    counts: list[int] | None  # how many tokens each row sees with each KV head, at most, if that is known


def _parts(layer: LayerSpec, batch: AttentionBatch, pattern: ContentPattern) -> list[_Part]:
    """All rows that choose, few enough at once."""
    found = []
    for rows in choosing_rows(batch, pattern).split(_CHOOSING_ROWS):
        if not len(rows):
            continue
        counts = None
        if pattern.counted_ahead:
            positions = batch.host_positions[rows]
            pages = pattern.pages_chosen(positions, batch.host_prompt_lens[rows], batch.page_size)
            tokens = (pages - 1) * batch.page_size + positions % batch.page_size + 1
            if layer.window is not None:
                tokens = tokens.clamp(max=layer.window)
            counts = tokens.repeat_interleave(layer.kv_heads).tolist()
        found.append(_Part(rows, to_device(rows, batch.slots.device), counts))
    return found
