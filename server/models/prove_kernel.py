"""Proves that the kernel that is to serve computes its pattern's definition, on this device.

The model's own proof compares whole models, in float32 and with all tokens visible. Here the serving kernel,
with the serving pattern, each kind of layer's window and the cache's dtype, is compared with the reference
kernel over the same random keys and values, so that only the kernel's rounding differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from attention.backends import Attention
from attention.batch import AttentionBatch
from attention.cache import PagedCache
from attention.dtypes import dtype_name
from attention.kernels.base import Kernel, Kind
from attention.kernels.reference import Reference
from attention.patterns.base import ContentPattern, Pattern
from attention.patterns.written import Written
from attention.types import LayerCache, LayerSpec
from server.errors import RefusedError

# Of a row's largest number, by the dtype with the fewest digits of queries, cache and products: some
# roundings of weights and values. A window off by one, a lost mask or a lost scale changes more.
_TOLERANCE = {
    torch.float32: 1e-4,
    torch.float16: 5e-3,
    torch.bfloat16: 3e-2,
    torch.float8_e4m3fn: 3e-2,  # its numbers are exact in any wider dtype, in which products are made
}
# Tokens of the long sequences: so many that kernels cut a row's keys into parts (Triton's have 256), more
# where a window or a pattern would hide none of them, and never more than the last number.
_TOKENS, _MOST_TOKENS = 600, 8192
_CHUNK, _SHORT = 24, 37


def prove_kernel(
    attention: Attention,
    device: torch.device | str,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    page_size: int,
) -> None:
    """Compares chunks of prompts and decodes, long and short, in each kind of layer, with the reference.

    Args:
        attention: pattern and kernel to serve.
        device: where they serve.
        dtype: of the queries.
        kv_dtype: of the cache.
        page_size: tokens per page.

    Raises:
        RefusedError: the kernel computes something else.
    """
    if isinstance(attention.kernel, Reference):
        return
    kinds: dict[tuple[LayerSpec, Pattern], LayerSpec] = {}
    for layer, pattern in attention.ruled_layers:
        kinds.setdefault((replace(layer, index=0), pattern), layer)
    tolerance = max(_TOLERANCE[dtype], _TOLERANCE[kv_dtype])
    if attention.kernel.products(kv_dtype) == "bfloat16":
        tolerance = max(tolerance, _TOLERANCE[torch.bfloat16])
    for (_, pattern), layer in kinds.items():
        trial = _Trial(layer, pattern, torch.device(device), dtype, kv_dtype, page_size)
        error = max(trial.errors(attention.kernel))
        if not error <= tolerance:
            window = "" if layer.window is None else f" in a window of {layer.window} tokens"
            raise RefusedError(
                f"kernel {attention.kernel.name} computes something else here than {pattern.name} attention"
                f"{window}, with {layer.query_heads} heads of {layer.head_size} over a KV cache in "
                f"{dtype_name(kv_dtype)}: by {error:.2g} of the largest number, where up to {tolerance:g} is "
                "rounding; choose another --kernel"
            )


class _Trial:
    """Random keys and values of four sequences in one layer, and steps over them.

    Args:
        layer: one of its kind.
        pattern: of its queries.
        device: where they serve.
        dtype: of the queries.
        kv_dtype: of the cache.
        page_size: tokens per page.
    """

    def __init__(
        self,
        layer: LayerSpec,
        pattern: Pattern,
        device: torch.device,
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
        page_size: int,
    ) -> None:
        self.layer, self.pattern, self.device = layer, pattern, device
        self.dtype, self.kv_dtype, self.page_size = dtype, kv_dtype, page_size
        self._random = torch.Generator().manual_seed(0)
        tokens = _tokens(layer, pattern, page_size)
        # A prompt's last chunk, a prompt's first one, a long decode and a short one.
        self._lengths = [tokens, _SHORT, tokens - 5, _SHORT]
        self._counts = [_CHUNK, _SHORT, 1, 1]
        self._prompts = [tokens, _SHORT, tokens - 9, _SHORT - 3]
        counts = [-(-length // page_size) for length in self._lengths]
        # From the last page down, so that no sequence's pages lie in order.
        self._pages = [list(range(sum(counts[: b + 1]), sum(counts[:b]), -1)) for b in range(len(counts))]
        cache = PagedCache(
            [layer],
            sum(counts) + 1,
            page_size,
            kv_dtype,
            device,
            pattern=pattern,
            poison=device.type == "cpu",
        )
        self._cache: LayerCache = cache.layers[layer.index]

    @torch.inference_mode()
    def errors(self, kernel: Kernel) -> Iterator[float]:
        """Of each step's rows the largest error, as a share of the row's largest number; NaN is infinite."""
        starts = [length - count for length, count in zip(self._lengths, self._counts, strict=True)]
        earlier = [b for b, start in enumerate(starts) if start]
        before = self._batch([0] * len(starts), starts, earlier)
        self._cache.write(before.device.slots, *self._keys(before))
        if isinstance(self.pattern, ContentPattern):
            self.pattern.update(self.layer, self._cache, Written.known(before.host, before.device))
        # All of them in a step, and the decodes without prompts beside them.
        for rows in (range(len(starts)), [b for b, count in enumerate(self._counts) if count == 1]):
            yield self._error(kernel, self._batch(starts, self._counts, rows))

    def _error(self, kernel: Kernel, batch: AttentionBatch) -> float:
        layer, pattern, cache = self.layer, self.pattern, self._cache
        kernel.write(cache, batch.device.slots, *self._keys(batch))
        if isinstance(pattern, ContentPattern):
            kernel.update(layer, cache, Written.known(batch.host, batch.device), pattern)
        # Large queries: some rows give most of their weight to a key that a fault would hide, or show.
        query = 2 * self._numbers(len(batch.host.positions), layer.query_heads, layer.head_size)
        rerotated = 2 * self._numbers(*query.shape) if pattern.rerotated else None
        sinks = self._numbers(layer.query_heads) if layer.sinks else None
        kind = Kind.of(layer, pattern, query, cache)
        found = kernel.forward(layer, query, cache, kernel.plan(kind, batch), sinks, rerotated).float()
        exact = Reference()
        expected = exact.forward(
            layer,
            query.float(),
            cache,
            exact.plan(kind, batch),
            sinks,
            None if rerotated is None else rerotated.float(),
        )
        error = (found - expected).abs().flatten(1).amax(1) / expected.abs().flatten(1).amax(1)
        return float(error.nan_to_num(nan=float("inf")).max())

    def _batch(self, computed: list[int], counts: list[int], rows: list[int] | range) -> AttentionBatch:
        return AttentionBatch.build(
            [computed[b] for b in rows],
            [counts[b] for b in rows],
            [self._pages[b] for b in rows],
            self.page_size,
            self.device,
            prompt_lens=[self._prompts[b] for b in rows],
        )

    def _keys(self, batch: AttentionBatch) -> tuple[torch.Tensor, torch.Tensor]:
        rows, heads = len(batch.host.positions), self.layer.kv_heads
        return self._numbers(rows, heads, self.layer.head_size), self._numbers(
            rows, heads, self.layer.value_size
        )

    def _numbers(self, *shape: int) -> torch.Tensor:
        """Random ones that both dtypes hold, so that casting queries to the cache's dtype rounds nothing."""
        numbers = torch.randn(*shape, generator=self._random)
        if self.kv_dtype.itemsize > 1:
            numbers = numbers.to(self.kv_dtype)
        return numbers.to(self.dtype).to(self.device)


def _tokens(layer: LayerSpec, pattern: Pattern, page_size: int) -> int:
    """Tokens of a long sequence."""
    tokens = max(_TOKENS, 3 * page_size)
    while tokens < _MOST_TOKENS and not pattern.dense and not _hides(pattern, tokens, page_size):
        tokens *= 2
    return min(max(tokens, (layer.window or 0) + 2 * _CHUNK), _MOST_TOKENS)


def _hides(pattern: Pattern, tokens: int, page_size: int) -> bool:
    """Whether the last of so many tokens' query does not see all of them."""
    last = torch.tensor([tokens - 2 * _CHUNK])
    if isinstance(pattern, ContentPattern):
        if pattern.most_pages(page_size) is None:
            return True  # whatever the length, as far as anything says
        return bool(pattern.pages_selected(last, torch.zeros_like(last), page_size) < last // page_size)
    begins, ends = pattern.spans(last).unbind(-1)
    return bool((ends - begins).clamp(min=0).sum() <= last)
