"""torch's FlexAttention for chunks of several query rows; rows that stand alone go the way of ``sdpa``.

FlexAttention skips blocks of keys that no row of a block of rows sees. Which these are follows from the
pattern's ranges, without a look at single pairs of a query and a key.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from functools import cache as once
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

from attention.formats import wider
from attention.kernels.base import Kernel, format_refusal, layer_ranges, locate, spans_within
from attention.kernels.plan import Rows, plan_alone, split, union
from attention.kernels.sdpa import attend_rows, gather
from attention.patterns.base import ContentPattern, Pattern
from attention.types import AttentionBatch, LayerCache, LayerSpec

# Rows and keys per block of the mask: FlexAttention's own default.
_BLOCK = 128


class _Chunk(NamedTuple):
    """Consecutive query rows of one sequence; rows and keys are padded to whole blocks."""

    start: int
    stop: int
    slots: torch.Tensor  # [keys]
    mask: BlockMask


class _Plan(NamedTuple):
    rows: list[Rows]
    chunks: list[_Chunk]


class Flex(Kernel):
    """Compiles once per pattern and number format, when a first chunk is computed, which takes seconds."""

    name = "flex"

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
        if isinstance(pattern, ContentPattern):
            reasons.append(f"flex cannot compute {pattern.name}, which chooses keys by content")
        if pattern.turned:
            reasons.append(f"flex cannot compute {pattern.name} with in-cache positions")
        if sinks := [layer for layer in layers if layer.sinks]:
            reasons.append(f"flex lacks learned sinks ({layer_ranges(sinks)})")
        reasons += format_refusal(self.name, dtype)
        if device.type == "cpu":
            reasons += _lacking_on_cpu()
        elif device.type == "cuda":
            small = [layer for layer in layers if min(layer.head_size, layer.value_size) < 16]
            if small:
                reasons.append(f"flex needs heads of at least 16 on cuda ({layer_ranges(small)})")
        else:
            reasons.append(f"flex runs on cpu or cuda, not on {device.type}")
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
        """See ``Kernel.forward``; computes in the format that holds queries and keys alike."""
        dtype = wider(query.dtype, cache.keys.dtype)
        # Soft-capping is beyond the path of sdpa, so even a row that stands alone is a chunk then.
        capped = layer.softcap is not None
        key = (self.name, layer.window, pattern, dtype, capped)
        plan: _Plan = batch.plan(key, lambda: _plan(batch, layer.window, pattern, dtype, capped))
        cast = query.to(dtype)
        output = query.new_empty(*query.shape[:2], layer.value_size)
        for rows in plan.rows:
            attend_rows(layer, cast, cache, rows, None, output)
        for chunk in plan.chunks:
            part = slice(chunk.start, chunk.stop)
            count = chunk.stop - chunk.start
            padded = pad(cast[part], (0, 0, 0, 0, 0, chunk.mask.shape[-2] - count))
            keys, values = (gather(pages, chunk.slots).to(dtype) for pages in (cache.keys, cache.values))
            heads_first = [_static(x.transpose(0, 1)[None], 1, 3) for x in (padded, keys, values)]
            result = _compiled()(*heads_first, chunk.mask, layer.scale, layer.softcap)
            output[part] = result[0, :, :count].transpose(0, 1)
        return output


@once
def _lacking_on_cpu() -> list[str]:
    """What this machine lacks for compiling FlexAttention for the CPU; looked up once."""
    reasons = []
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        reasons.append(f"flex compiles C++, but there is no {compiler}: install it, or name another in CXX")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        reasons.append("flex compiles C++, but Python.h is missing: install Python's development files")
    if sys.platform == "darwin" or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        reasons.append("flex needs a CPU with AVX2, and not macOS")
    return reasons


@once
def _compiled() -> Callable[..., torch.Tensor]:
    """``_attend`` for any number of rows and keys; a pattern's number of ranges makes a variant."""
    compiled = torch.compile(_attend, dynamic=True, fullgraph=True)
    # Scale and soft-cap stay constants: FlexAttention takes no others from a graph.
    return torch._dynamo.config.patch(specialize_float=True)(compiled)


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: BlockMask,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """``[1, H, rows, Dv]`` from ``[1, H, rows, D]`` and ``[1, Hkv, keys, ...]``."""
    score_mod = None if softcap is None else _capped(softcap)
    return flex_attention(query, keys, values, score_mod, mask, scale, enable_gqa=True)


def _capped(softcap: float) -> Callable[..., torch.Tensor]:
    def capped(score: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


def _plan(
    batch: AttentionBatch, window: int | None, pattern: Pattern, dtype: torch.dtype, capped: bool
) -> _Plan:
    alone, chunks = split(batch, pattern)
    rows: list[Rows] = []
    if capped:
        owners = batch.owners.tolist()
        chunks = sorted([*chunks, *((owners[row], row, row + 1) for row in alone)])
    else:
        rows = plan_alone(batch, alone, window, pattern, dtype)
    return _Plan(rows, [_plan_chunk(batch, *chunk, window, pattern) for chunk in chunks])


def _plan_chunk(
    batch: AttentionBatch, b: int, start: int, stop: int, window: int | None, pattern: Pattern
) -> _Chunk:
    """Gathers what any of the rows sees, and says which columns of it each row sees."""
    at = batch.positions[start:stop]
    spans = spans_within(pattern.spans(at), at, window)
    held = [torch.arange(*span, device=at.device) for span in union(spans.flatten(0, 1).tolist())]
    positions = torch.cat(held)
    slots, there = locate(batch, torch.tensor(b, device=at.device), positions)
    slots, positions = slots[there], positions[there]
    # A range of positions is a range of columns, and what is gone has none.
    columns = torch.searchsorted(positions, spans.contiguous())
    # Compiled code that meets an extent of 1, or two that are equal, takes them to be so always.
    row_blocks = max(2, _blocks(len(at)))
    key_blocks = max(row_blocks, _blocks(len(slots))) + 1
    # Rows that fill up a block see what the last one sees, which lets whole blocks go without the mask.
    columns = torch.cat([columns, columns[-1:].expand(-len(at) % _BLOCK, -1, -1)])
    columns = pad(columns, (0, 0, 0, 0, 0, row_blocks * _BLOCK - len(columns)))
    # Padding must not read what was never written: the last query's own key stands in.
    slots = torch.cat([slots, batch.slots[stop - 1].expand(key_blocks * _BLOCK - len(slots))])
    return _Chunk(start, stop, slots, _block_mask(columns, key_blocks))


def _static(tensor: torch.Tensor, *dims: int) -> torch.Tensor:
    """The tensor, marked: these extents are constants, not equal by chance to ones that vary."""
    for dim in dims:
        torch._dynamo.mark_static(tensor, dim)
    return tensor


def _blocks(count: int) -> int:
    return -(-count // _BLOCK)


def _block_mask(columns: torch.Tensor, key_blocks: int) -> BlockMask:
    """From what each row sees, as ranges of columns ``[rows, K, 2]``."""
    rows = len(columns)
    begins, ends = (_static(edge.T.int().contiguous(), 0) for edge in columns.unbind(-1))

    def visible(b: torch.Tensor, head: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        seen = (column >= begins[0, row]) & (column < ends[0, row])
        for k in range(1, len(begins)):
            seen = seen | ((column >= begins[k, row]) & (column < ends[k, row]))
        return seen

    begin, end = columns.unbind(-1)
    some = _rows_in_blocks(begin // _BLOCK, -(-end // _BLOCK), begin < end, key_blocks) > 0
    whole = _rows_in_blocks(-(-begin // _BLOCK), end // _BLOCK, begin < end, key_blocks) == _BLOCK
    return BlockMask.from_kv_blocks(
        *_listed(some & ~whole),
        *_listed(whole),
        BLOCK_SIZE=_BLOCK,
        mask_mod=visible,
        seq_lengths=(rows, key_blocks * _BLOCK),
        compute_q_blocks=False,
    )


def _rows_in_blocks(
    first: torch.Tensor, stop: torch.Tensor, real: torch.Tensor, key_blocks: int
) -> torch.Tensor:
    """How many ranges of each block of rows hold each block of keys, ``[row blocks, key blocks]``.

    Args:
        first: for each row's ranges ``[rows, K]``, the first block of keys.
        stop: the block after the last.
        real: which of the ranges are not empty.
        key_blocks: number of blocks of keys.
    """
    which = (torch.arange(len(first), device=first.device) // _BLOCK)[:, None].expand_as(first)
    count = (real & (first < stop)).int()
    marks = count.new_zeros(len(first) // _BLOCK, key_blocks + 1)
    marks.index_put_((which, first), count, accumulate=True)
    marks.index_put_((which, stop), -count, accumulate=True)
    return marks.cumsum(dim=1)[:, :-1]


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks of keys each block of rows has, ``[1, 1, R]``, and these first, ``[1, 1, R, C]``."""
    order = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(dim=1).int()[None, None], order.int()[None, None]
