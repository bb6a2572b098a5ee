"""The keys in a query's hash buckets."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from attention.dtypes import taken
from attention.patterns.base import ContentPattern
from attention.patterns.blocks import SelectingRows
from attention.patterns.declared import LSH, check_buckets
from attention.patterns.options import NumberedPattern
from attention.patterns.runs import ranges_by_block, runs
from attention.patterns.written import Written
from attention.types import LayerCache, LayerSpec


class Lsh(NumberedPattern, ContentPattern):
    """The first tokens, the last, and of those between them the ones that share a bucket with the query.

    Kitaev et al.: Reformer: The Efficient Transformer, 2020, section 2: in each round of hashing a vector
    ``x`` falls into bucket ``argmax([xR; -xR])`` of random directions ``R``, and a query sees the keys of its
    own buckets in any round. A KV head's selection is the union over the query heads that share it.
    The directions depend only on the seed, the layer's index and the head size.

    Reformer was trained with one vector as query and key, so similar tokens share buckets. In other models
    queries and keys have unrelated directions: a query's bucket holds the keys of the most similar direction,
    and many queries find none. Hence the window and the first tokens, which are not in the paper. Reformer's
    normalization of keys to unit length does not change an argmax. Every row selects, in prompts too.
    Reformer sorts by bucket and cuts the order into chunks, which bounds the cost; here a query sees whole
    buckets.

    Very lossy on a model trained without it; no page is freed.

    Args:
        hashes: rounds of hashing; at least 1.
        buckets: of each round, an even number. Reformer has 64 tokens in a bucket: so many buckets as the
            context has tokens, divided by 64. The default is right for a context of 8,192.
        window: tokens that are always visible, the query's own included; at least 1.
        sinks: first tokens that are always visible.
        seed: of the directions.
        dense_layers: indices of layers that see every earlier token instead.

    Raises:
        ValueError: ``buckets`` is odd or too large.
    """

    name = "lsh"
    numbers: ClassVar = LSH.numbers

    def __init__(
        self,
        hashes: int,
        buckets: int,
        window: int,
        sinks: int,
        seed: int = 0,
        dense_layers: tuple[int, ...] = (),
    ) -> None:
        check_buckets({"buckets": buckets})
        self.dense_layers = dense_layers
        self.hashes = hashes
        self.buckets = buckets
        self.window = window
        self.sinks = sinks
        self.seed = seed
        self._directions: dict[tuple[int, int, torch.device], torch.Tensor] = {}

    def summary_of(
        self, layer: LayerSpec, page_size: int, dtype: torch.dtype
    ) -> tuple[torch.Size, torch.dtype]:
        """See ``ContentPattern.summary_of``: the buckets of each token's keys."""
        return torch.Size([page_size, layer.kv_heads, self.hashes]), self._number_format

    def update(self, layer: LayerSpec, cache: LayerCache, written: Written) -> None:
        """See ``ContentPattern.update``; the step's tokens."""
        assert cache.summary is not None
        slots = written.batch.slots
        cache.summary.flatten(0, 1)[slots] = self._hash(layer, taken(cache.keys.flatten(0, 1), slots))

    def selects(self, positions: torch.Tensor, prompt_lens: torch.Tensor) -> torch.Tensor:
        """See ``ContentPattern.selects``; all do."""
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
        return self._sees(layer, query[None], positions[None], self._hash(layer, keys)[None])[0]

    def select(
        self, layer: LayerSpec, query: torch.Tensor, rows: SelectingRows, cache: LayerCache
    ) -> torch.Tensor:
        """See ``ContentPattern.select``; consecutive tokens make one range."""
        assert cache.summary is not None
        found = []
        numbers = rows.batch.page_size * layer.kv_heads
        for block in rows.blocks(4 * numbers * self.hashes, 16 * numbers):
            key_buckets = cache.summary[block.pages].flatten(1, 2)
            sees = self._sees(layer, query[block.rows], block.positions, key_buckets)
            found.append((block.rows, runs(sees)))
        return ranges_by_block(found, len(rows), layer.kv_heads, query.device)

    @property
    def _number_format(self) -> torch.dtype:
        return torch.uint8 if self.buckets <= 256 else torch.int16

    def _sees(
        self,
        layer: LayerSpec,
        query: torch.Tensor,
        positions: torch.Tensor,
        key_buckets: torch.Tensor,
    ) -> torch.Tensor:
        """Bool ``[S, R, Hkv, L]``; ``query`` is ``[S, R, H, D]``, ``key_buckets`` ``[S, L, Hkv, hashes]``."""
        at = torch.arange(key_buckets.shape[1], device=query.device)
        near = (at < self.sinks) | (at > positions[..., None] - self.window)
        sees = near[:, :, None].repeat(1, 1, layer.kv_heads, 1)
        grouped = self._hash(layer, query).unflatten(2, (layer.kv_heads, -1))
        for mine, theirs in zip(grouped.unbind(dim=-1), key_buckets.unbind(dim=-1), strict=True):
            theirs = theirs.transpose(1, 2)[:, None].contiguous()
            for head in mine.unbind(dim=-1):
                sees |= head[..., None] == theirs
        return sees & (at <= positions[..., None])[:, :, None]

    def _hash(self, layer: LayerSpec, vectors: torch.Tensor) -> torch.Tensor:
        """The buckets ``[..., hashes]`` of ``vectors`` ``[..., D]``.

        Products are summed in double precision and then rounded, so that the order of the sum, which depends
        on shapes and machine, does not show.
        """
        exact = vectors.double()
        buckets = []
        for directions in self._directions_of(layer, vectors.device):
            rotated = (exact @ directions).float()
            buckets.append(torch.cat([rotated, -rotated], dim=-1).argmax(dim=-1).to(self._number_format))
        return torch.stack(buckets, dim=-1)

    def _directions_of(self, layer: LayerSpec, device: torch.device) -> torch.Tensor:
        """Float64 ``[hashes, D, buckets / 2]``, the same on every machine."""
        key = (layer.index, layer.head_size, device)
        if key not in self._directions:
            # The one generator of numpy whose numbers are guaranteed not to change.
            sequence = np.random.SeedSequence((self.seed, layer.index, layer.head_size))
            random = np.random.RandomState(np.random.MT19937(sequence))
            numbers = random.standard_normal((self.hashes, layer.head_size, self.buckets // 2))
            # Rounded, so that the last digit of the machine's logarithm does not matter.
            self._directions[key] = torch.from_numpy(numbers.astype(np.float32)).double().to(device)
        return self._directions[key]
