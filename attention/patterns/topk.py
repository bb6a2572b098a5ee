"""The pages whose keys may have the largest products with a query."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.nn.functional import pad

from attention.dtypes import put, taken
from attention.patterns.base import ContentPattern
from attention.patterns.blocks import SelectingRows
from attention.patterns.declared import TOPK
from attention.patterns.options import NumberedPattern
from attention.patterns.written import Written
from attention.types import LayerCache, LayerSpec

# For any budget: the first page, the query's own and one that it selects.
_LEAST_PAGES = 3


class TopK(NumberedPattern, ContentPattern):
    """The first pages, the recent ones, and of those between them the ones that score highest.

    Tang et al.: Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference, 2024, section 3.4. With
    the smallest and the largest number that the page's keys have in each dimension, a query head's product
    with any key of the page is at most ``sum_d max(q_d * min_d, q_d * max_d)``, which is the page's score.
    Query heads that share a KV head have one selection: with its scaled bounds as logits, softmax gives each
    head's share of attention for every page, and the page's score is the sum of its shares. (On the
    default model this loses less than the sum or the maximum of the bounds, since one head's bounds may be
    many times another's.) Ties go to the earlier page. As in the paper the first two layers see all, and so
    do the rows of a prompt; unlike in the paper the first and the recent pages are always selected.

    Pages are the cache's pages. Pages between are complete and before the query, so a row's selection does
    not depend on the step in which it is computed. In a layer with a window of its own, pages wholly behind
    the window cannot be selected.

    Lossy, unless ``budget`` covers the context; no page is freed. Kernel ``cpu_paged`` selects the same pages
    in C++ (``attention.kernels.cpu.select``); under any other, ``update`` and ``select`` do so in torch.

    Args:
        budget: tokens that a query sees, rounded up to whole pages: at least 3, and at least those always
            selected.
        sink_pages: first pages that are always selected.
        recent_pages: pages that are always selected, ending with the query's own, which may be partial; at
            least 1.
        prefill: ``dense``: a prompt's tokens see every earlier token; ``sparse``: every token sees only its
            selection.
        dense_layers: indices of layers that see every earlier token.
    """

    name = "topk"
    numbers: ClassVar = TOPK.numbers
    words: ClassVar = TOPK.words
    dense_by_default = TOPK.dense_layers
    counted_ahead = True
    capturable = True

    def __init__(
        self,
        budget: int,
        sink_pages: int,
        recent_pages: int,
        prefill: str = "dense",
        dense_layers: tuple[int, ...] = (),
    ) -> None:
        self.dense_layers = dense_layers
        self.budget = budget
        self.sink_pages = sink_pages
        self.recent_pages = recent_pages
        self.prefill = prefill
        self.decoded_keys_differ = prefill == "dense"

    def summary_of(
        self, layer: LayerSpec, page_size: int, dtype: torch.dtype
    ) -> tuple[torch.Size, torch.dtype]:
        """See ``ContentPattern.summary_of``: the smallest and the largest numbers of the page's keys."""
        return torch.Size([2, layer.kv_heads, layer.head_size]), dtype

    def update(self, layer: LayerSpec, cache: LayerCache, written: Written) -> None:
        """See ``ContentPattern.update``; only pages that the step completes: no others can be selected."""
        assert cache.summary is not None
        if len(written.pages):
            put(cache.summary, written.summaries, _summaries(taken(cache.keys, written.pages)))

    def selects(self, positions: torch.Tensor, prompt_lens: torch.Tensor) -> torch.Tensor:
        """See ``ContentPattern.selects``."""
        if self.prefill == "dense":
            return positions >= prompt_lens
        return torch.ones_like(positions, dtype=torch.bool)

    def selection(
        self,
        layer: LayerSpec,
        query: torch.Tensor,
        positions: torch.Tensor,
        keys: torch.Tensor,
        page_size: int,
    ) -> torch.Tensor:
        """See ``ContentPattern.selection``."""
        complete = len(keys) // page_size
        summaries = _summaries(keys[: complete * page_size].unflatten(0, (complete, page_size)))
        picked = self._pick(layer, query[None], positions[None], summaries[None], page_size)[0]
        own = positions // page_size
        page = torch.arange(complete + 1, device=keys.device)
        seen = (page < self.sink_pages) | (page > own[:, None] - self.recent_pages)
        seen = seen[:, None].repeat(1, layer.kv_heads, 1)
        seen.scatter_(-1, picked.where(picked < complete, own[:, None, None]), True)
        at = torch.arange(len(keys), device=keys.device)
        return seen[..., at // page_size] & (at <= positions[:, None, None])

    def select(
        self, layer: LayerSpec, query: torch.Tensor, rows: SelectingRows, cache: LayerCache
    ) -> torch.Tensor:
        """See ``ContentPattern.select``: the first pages, one range per page between, the recent pages."""
        assert cache.summary is not None
        page_size = rows.batch.page_size
        width = min(self.most_selected(page_size), rows.batch.page_table.shape[1])
        ranges = query.new_zeros(len(rows), layer.kv_heads, width + 2, 2, dtype=torch.long)
        numbers = layer.kv_heads * layer.head_size
        for block in rows.blocks(32 * numbers, 32 * layer.query_heads):
            if block.pages.shape[1] <= self.most_pages(page_size):
                ranges[block.rows, :, 0, 1] = block.positions[..., None] + 1
                continue
            summaries = taken(cache.summary, block.pages.flatten()).unflatten(0, block.pages.shape)
            picked = self._pick(layer, query[block.rows], block.positions, summaries, page_size)
            recent = (block.positions // page_size - self.recent_pages + 1).clamp(min=0) * page_size
            between = pad(picked, (0, width - picked.shape[-1]), value=block.pages.shape[1])
            between = torch.stack([between, between + 1], dim=-1) * page_size
            first = torch.stack([torch.zeros_like(recent), recent.clamp(max=self.sink_pages * page_size)], -1)
            last = torch.stack([recent, block.positions + 1], dim=-1)
            sides = (-1, -1, layer.kv_heads, 1, 2)
            ranges[block.rows] = torch.cat(
                [
                    first[:, :, None, None].expand(sides),
                    between.minimum(recent[..., None, None, None]),  # pages that were not picked become empty
                    last[:, :, None, None].expand(sides),
                ],
                dim=3,
            )
        return ranges

    def pages_selected(
        self, positions: torch.Tensor, prompt_lens: torch.Tensor, page_size: int
    ) -> torch.Tensor:
        """See ``ContentPattern.pages_selected``."""
        before = positions // page_size + 1
        most = self.most_pages(page_size)
        return before.where(~self.selects(positions, prompt_lens), before.clamp(max=most))

    def most_pages(self, page_size: int) -> int:
        """See ``ContentPattern.most_pages``."""
        return self.sink_pages + self.most_selected(page_size) + self.recent_pages

    def most_selected(self, page_size: int) -> int:
        """The most pages that a query selects besides those always selected."""
        pages = max(-(-self.budget // page_size), _LEAST_PAGES)
        return max(0, pages - self.sink_pages - self.recent_pages)

    def _pick(
        self,
        layer: LayerSpec,
        query: torch.Tensor,
        positions: torch.Tensor,
        summaries: torch.Tensor,
        page_size: int,
    ) -> torch.Tensor:
        """The selected pages between: int64 ``[S, R, Hkv, K]``, ascending, ``P`` for none.

        ``query`` is ``[S, R, H, D]``, ``positions`` ``[S, R]``, ``summaries`` ``[S, P, 2, Hkv, D]``.
        """
        page = torch.arange(summaries.shape[1], device=query.device)
        allowed = (page >= self.sink_pages) & (page <= positions[..., None] // page_size - self.recent_pages)
        if layer.window is not None:
            allowed &= (page + 1) * page_size > positions[..., None] - layer.window + 1
        scores = _scores(layer, query, summaries, allowed)
        best = _highest(scores, min(self.most_selected(page_size), len(page)))
        there = allowed[:, :, None].expand_as(scores).gather(-1, best)
        return best.where(there, len(page)).sort(dim=-1).values


def _highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the ``count`` highest of the last dimension, of equal ones the first; NaN is the highest.

    ``torch.topk`` takes any of equal numbers, so it gets integers that are all different: the score's bits in
    their order, then the index from the end.
    """
    bits = scores.where(~scores.isnan(), torch.nan).add(0.0).view(torch.int32).long()  # one NaN, one zero
    order = bits.where(bits >= 0, bits ^ 0x7FFFFFFF)
    index = torch.arange(scores.shape[-1], device=scores.device)
    return ((order << 32) - index).topk(count, dim=-1, sorted=False).indices


def _summaries(pages: torch.Tensor) -> torch.Tensor:
    """``[P, 2, Hkv, D]``: the smallest and the largest numbers of keys ``[P, page_size, Hkv, D]``."""
    # torch cannot compare float8, whose numbers float16 holds.
    wide = pages.half() if pages.dtype == torch.float8_e4m3fn else pages
    return torch.stack(wide.aminmax(dim=1), dim=1).to(pages.dtype)


def _scores(
    layer: LayerSpec, query: torch.Tensor, summaries: torch.Tensor, allowed: torch.Tensor
) -> torch.Tensor:
    """Scores ``[S, R, Hkv, P]`` of the pages ``allowed`` ``[S, R, P]``, minus infinity for others.

    Other shapes as in ``TopK._pick``. Summed in double precision and then rounded, so that the order of the
    sums, which depends on shapes and machine, does not show: equal pages score the same.
    """
    heads = query.double().unflatten(2, (layer.kv_heads, -1)).transpose(1, 2)
    # The larger product is with the largest number where the query's is positive, else with the smallest.
    signs = torch.cat([heads.clamp(max=0), heads.clamp(min=0)], dim=-1)
    by_head = summaries.permute(0, 3, 1, 2, 4)
    ends = torch.empty(by_head.shape, dtype=torch.double, device=query.device).copy_(by_head).flatten(3)
    bounds = (signs.flatten(2, 3) @ ends.transpose(2, 3)).unflatten(2, signs.shape[2:4])
    bounds = (bounds * layer.scale).masked_fill_(~allowed[:, None, :, None], float("-inf"))
    shares = bounds.log_softmax(dim=-1).logsumexp(dim=3).float().transpose(1, 2)
    return shares.masked_fill(~allowed[:, :, None], float("-inf"))
