"""Gather from the pages, then torch's ``scaled_dot_product_attention``.

Two shapes of work. Decodes (one query token) of many sequences go together in padded groups of similar
length. Longer chunks go one sequence at a time. What to gather and which mask to use depends on the batch,
the pattern and the layer's window only, so it is planned once per batch and shared by layers that agree.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from attention.kernels.base import Kernel, layer_ranges, locate, visibility
from attention.patterns.base import ContentPattern, Pattern
from attention.types import AttentionBatch, LayerCache, LayerSpec

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Up to this many tokens, a launch of its own costs more than the padding it saves.
_SHORT = 128

# Query rows per block under a window: few blocks, and a block reads little more than its windows.
_BLOCK_ROWS = 256


class _Decodes(NamedTuple):
    """``N`` sequences with one query token each; each reads ``L`` cached tokens, padding included."""

    rows: torch.Tensor  # [N] query rows
    slots: torch.Tensor  # [N, L]
    mask: torch.Tensor | None  # [N, 1, 1, L], added to the logits


class _Chunk(NamedTuple):
    """Consecutive query rows of one sequence, which read the same ``L`` cached tokens."""

    start: int
    stop: int
    slots: torch.Tensor  # [L]
    mask: torch.Tensor | None  # [stop - start, L], added to the logits; None: causal, square


class _Plan(NamedTuple):
    decodes: list[_Decodes]
    chunks: list[_Chunk]


class Sdpa(Kernel):
    """Works on any device and for any pattern that is a rule over positions."""

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
        if isinstance(pattern, ContentPattern) or pattern.turned:
            reasons.append(f"sdpa cannot compute {pattern.name}")
        if capped := [layer for layer in layers if layer.softcap is not None]:
            reasons.append(f"sdpa lacks soft-capping ({layer_ranges(capped)})")
        if sinks := [layer for layer in layers if layer.sinks]:
            reasons.append(f"sdpa lacks learned sinks ({layer_ranges(sinks)})")
        if dtype not in _DTYPES:
            reasons.append(f"sdpa computes in float32, bfloat16 or float16, not {str(dtype)[6:]}")
        return reasons

    def forward(
        self,
        layer: LayerSpec,
        query: torch.Tensor,
        cache: LayerCache,
        batch: AttentionBatch,
        pattern: Pattern,
        sinks: torch.Tensor | None,
        turned: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See ``Kernel.forward``."""
        dtype = cache.keys.dtype
        key = (self.name, layer.window, pattern, dtype)
        plan: _Plan = batch.plan(key, lambda: _plan(batch, layer.window, pattern, dtype))
        # [T, Hkv, G, D]: the heads that share a key head lie together, so keys need no expansion.
        grouped = query.to(dtype).unflatten(1, (layer.kv_heads, -1))
        output = query.new_empty(*query.shape[:2], layer.value_size)
        for decodes in plan.decodes:
            result = scaled_dot_product_attention(
                grouped[decodes.rows],
                _gather(cache.keys, decodes.slots).transpose(1, 2),
                _gather(cache.values, decodes.slots).transpose(1, 2),
                attn_mask=decodes.mask,
                scale=layer.scale,
            )
            output[decodes.rows] = result.flatten(1, 2).to(query.dtype)
        group = layer.query_heads // layer.kv_heads
        for chunk in plan.chunks:
            keys = _gather(cache.keys, chunk.slots).transpose(0, 1)
            values = _gather(cache.values, chunk.slots).transpose(0, 1)
            result = scaled_dot_product_attention(
                grouped[chunk.start : chunk.stop].permute(1, 2, 0, 3),
                keys[:, None].expand(-1, group, -1, -1),
                values[:, None].expand(-1, group, -1, -1),
                attn_mask=chunk.mask,
                is_causal=chunk.mask is None,
                scale=layer.scale,
            )
            output[chunk.start : chunk.stop] = result.permute(2, 0, 1, 3).flatten(1, 2).to(query.dtype)
        return output


def _gather(pages: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The tokens ``[*slots.shape, Hkv, D]`` of ``pages`` ``[P, page_size, Hkv, D]`` that lie at ``slots``."""
    return pages.flatten(0, 1).index_select(0, slots.flatten()).unflatten(0, slots.shape)


def _plan(batch: AttentionBatch, window: int | None, pattern: Pattern, dtype: torch.dtype) -> _Plan:
    """What to gather and which masks to use."""
    decodes = [b for b in range(batch.size) if batch.query_len(b) == 1]
    chunks = [b for b in range(batch.size) if batch.query_len(b) > 1]
    return _Plan(
        [_plan_decodes(batch, group, window, pattern, dtype) for group in _groups(batch, decodes, window)],
        [chunk for b in chunks for chunk in _plan_chunks(batch, b, window, pattern, dtype)],
    )


def _reach(seq_len: int, window: int | None) -> int:
    """How many tokens, counted back from the last, the last can see under the layer's own window."""
    return seq_len if window is None else min(seq_len, window)


def _groups(batch: AttentionBatch, sequences: list[int], window: int | None) -> list[list[int]]:
    """Splits ``sequences`` so that padding never doubles the work, except among short ones."""
    groups: list[list[int]] = []
    longest = 0
    for b in sorted(sequences, key=lambda b: -_reach(batch.seq_lens[b], window)):
        reach = _reach(batch.seq_lens[b], window)
        if not groups or longest > max(2 * reach, _SHORT):
            groups.append([])
            longest = reach
        groups[-1].append(b)
    return groups


def _plan_decodes(
    batch: AttentionBatch, sequences: list[int], window: int | None, pattern: Pattern, dtype: torch.dtype
) -> _Decodes:
    """One padded group; its longest member comes first."""
    device = batch.page_table.device
    rows = torch.tensor([batch.query_starts[b] for b in sequences], device=device)
    which = torch.tensor(sequences, device=device)[:, None]
    last = torch.tensor([batch.seq_lens[b] - 1 for b in sequences], device=device)[:, None]
    reaches = [_reach(batch.seq_lens[b], window) for b in sequences]
    back = torch.arange(reaches[0], device=device)
    # Counted back from the last token, so that padding lies before the sequence's beginning or its window.
    positions = last - back
    slots, there = locate(batch, which, positions.clamp(min=0))
    if pattern.dense and reaches[0] == reaches[-1]:
        return _Decodes(rows, slots, None)
    visible = visibility(last, positions, window, pattern) & there & (positions >= 0)
    # Padding must not read what was never written: a dense pattern has kept the sequence's first token,
    # which stands in here; otherwise the query's own does.
    if not pattern.dense:
        slots, visible = _compact(slots, visible)
    return _Decodes(rows, slots, _additive(visible, dtype)[:, None, None])


def _compact(slots: torch.Tensor, visible: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Moves each row's visible slots to its front and cuts what no row needs; the rest repeats the first."""
    counts = visible.sum(dim=1)
    width = int(counts.max())
    row, column = visible.nonzero(as_tuple=True)
    compacted = slots[:, :1].repeat(1, width)
    compacted[row, visible.cumsum(dim=1)[row, column] - 1] = slots[row, column]
    return compacted, torch.arange(width, device=slots.device) < counts[:, None]


def _plan_chunks(
    batch: AttentionBatch, b: int, window: int | None, pattern: Pattern, dtype: torch.dtype
) -> list[_Chunk]:
    """One sequence's chunk, in blocks of rows where a window makes that cheaper."""
    device = batch.page_table.device
    start, stop, seq_len = batch.query_starts[b], batch.query_starts[b + 1], batch.seq_lens[b]
    offset = seq_len - stop  # from a query row to its position
    step = stop - start if window is None or seq_len <= window else max(window, _BLOCK_ROWS)
    chunks = []
    for first in range(start, stop, step):
        last = min(first + step, stop)
        begin = max(0, first + offset - window + 1) if window is not None else 0
        end = last + offset
        positions = torch.arange(begin, end, device=device)
        slots, there = locate(batch, torch.tensor(b, device=device), positions)
        if pattern.dense and first + offset == begin and (window is None or end - begin <= window):
            chunks.append(_Chunk(first, last, slots, None))
            continue
        queries = torch.arange(first + offset, end, device=device)[:, None]
        visible = visibility(queries, positions, window, pattern) & there
        if not pattern.dense:
            seen = visible.any(dim=0)
            slots, visible = slots[seen], visible[:, seen]
        chunks.append(_Chunk(first, last, slots, _additive(visible, dtype)))
    return chunks


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where visible, minus infinity elsewhere: the form that torch's kernels use inside."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
        ~visible, float("-inf")
    )
