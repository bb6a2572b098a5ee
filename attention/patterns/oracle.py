"""The keys with most of a query's attention: no selection of as many keeps more of it."""

from __future__ import annotations

import torch

from attention.dtypes import taken
from attention.patterns.base import ContentPattern
from attention.patterns.blocks import SelectingRows
from attention.patterns.runs import ranges_by_block, runs
from attention.patterns.topk import TopK
from attention.patterns.written import Written
from attention.types import LayerCache, LayerSpec

_DOUBLE = torch.double.itemsize


class Oracle(TopK):
    """As many tokens as ``topk`` sees: the same first and recent pages, and the others with most attention.

    It is for measuring, not for serving: every query computes its product with every key to find the best
    ones. The loss of ``topk`` against it is the error of selecting whole pages by bounds; its own loss
    against full attention is the loss due to the budget. Gupta et al.: Memory-efficient Transformers via
    Top-k Attention, 2021, section 2, have each query head see its keys with the largest products.

    Query heads that share a KV head have one selection, as in ``topk``: each head gives a token its attention
    weight in the softmax over all keys that the query may see, and the tokens with the largest sums of
    weights are selected. So the selection keeps the most attention, summed over its heads, that so many
    tokens can hold. (The largest weight of any head would serve one head at the expense of the others.) Ties
    go to the earlier token. Learned sinks, which have no key, are no part of these softmaxes.

    The most attention does not always give the nearest output: if a layer attends to all tokens about
    equally, the mean of arbitrary tokens is near the mean of all, and the mean of those with the largest
    weights is not. In the default model this is so in the first layer, which sees all by default; in the
    others the oracle's output is several times nearer to full attention's than ``topk``'s.

    Lossy, unless ``budget`` covers the context; no page is freed, and every page is read. The
    selection is computed in torch under any kernel.

    Args:
        budget: as in ``topk``: the tokens of its whole pages, but at any positions.
        sink_pages: first pages that are always selected.
        recent_pages: pages that are always selected, ending with the query's own.
        prefill: as in ``topk``.
        dense_layers: as in ``topk``.
    """

    name = "oracle"
    counted_ahead = False
    capturable = False  # the number of ranges that keys give is read from the device

    def summary_of(
        self, layer: LayerSpec, page_size: int, dtype: torch.dtype
    ) -> tuple[torch.Size, torch.dtype]:
        """See ``ContentPattern.summary_of``: empty, since the keys themselves are read."""
        return torch.Size([0]), dtype

    def update(self, layer: LayerSpec, cache: LayerCache, written: Written) -> None:
        """See ``ContentPattern.update``; there is nothing to do."""

    def selection(
        self,
        layer: LayerSpec,
        query: torch.Tensor,
        positions: torch.Tensor,
        keys: torch.Tensor,
        page_size: int,
    ) -> torch.Tensor:
        """See ``ContentPattern.selection``."""
        return self._sees(layer, query[None], positions[None], keys[None], page_size)[0]

    def select(
        self, layer: LayerSpec, query: torch.Tensor, rows: SelectingRows, cache: LayerCache
    ) -> torch.Tensor:
        """See ``ContentPattern.select``; consecutive tokens make one range."""
        page_size = rows.batch.page_size
        page_bytes = page_size * layer.kv_heads * layer.head_size * (cache.keys.itemsize + 2 * _DOUBLE)
        found = []
        for block in rows.blocks(page_bytes, 4 * _DOUBLE * page_size * layer.query_heads):
            keys = taken(cache.keys, block.pages.flatten()).unflatten(0, block.pages.shape).flatten(1, 2)
            sees = self._sees(layer, query[block.rows], block.positions, keys, page_size)
            found.append((block.rows, runs(sees)))
        return ranges_by_block(found, len(rows), layer.kv_heads, query.device)

    def pages_selected(
        self, positions: torch.Tensor, prompt_lens: torch.Tensor, page_size: int
    ) -> torch.Tensor:
        """See ``ContentPattern.pages_selected``; all up to its own."""
        return ContentPattern.pages_selected(self, positions, prompt_lens, page_size)

    def _sees(
        self,
        layer: LayerSpec,
        query: torch.Tensor,
        positions: torch.Tensor,
        keys: torch.Tensor,
        page_size: int,
    ) -> torch.Tensor:
        """Bool ``[S, R, Hkv, L]``; ``query`` is ``[S, R, H, D]``, ``keys`` ``[S, L, Hkv, D]``."""
        at = torch.arange(keys.shape[1], device=query.device)
        there = at <= positions[..., None]
        if layer.window is not None:
            there &= at > positions[..., None] - layer.window
        page, own = at // page_size, positions[..., None] // page_size
        always = (page < self.sink_pages) | (page > own - self.recent_pages)
        between = (there & ~always)[:, :, None]
        scores = _scores(layer, query, keys, there).masked_fill(~between, float("-inf"))
        count = min(self.most_selected(page_size) * page_size, len(at))
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
        picked = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
        return (picked & between) | (always & (at <= positions[..., None]))[:, :, None]


def _scores(layer: LayerSpec, query: torch.Tensor, keys: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """Logarithms ``[S, R, Hkv, L]`` of the attention that a KV head's queries give a key in all.

    Shapes as in ``Oracle._sees``; ``there`` ``[S, R, L]`` are the keys that may be seen. Summed in double
    precision and then rounded, so that the order of the sums does not show.
    """
    heads = query.double().unflatten(2, (layer.kv_heads, -1)).permute(0, 2, 1, 3, 4)
    by_head = keys.permute(0, 2, 3, 1).to(torch.double)
    logits = (heads.flatten(2, 3) @ by_head).unflatten(2, heads.shape[2:4]) * layer.scale
    if layer.softcap is not None:
        logits = layer.softcap * torch.tanh(logits / layer.softcap)
    # Not a product with the mask: unwritten keys may be NaN.
    logits = logits.masked_fill_(~there[:, None, :, None], float("-inf"))
    return logits.log_softmax(dim=-1).logsumexp(dim=3).float().transpose(1, 2)
