"""The flash-attn packages, which read pages in place.

Three interfaces go by that name and may be installed side by side. They are tried in this order: FA3
(``flash_attn_interface``, Hopper only), FA2 (``flash_attn``), FA4 (``flash_attn.cute``, Hopper and Blackwell,
no split over the keys yet). All of them align causality and windows with the last key, so that a chunk's
queries are the sequence's last tokens, as here.

They multiply what they mask by zero, and FA3 and FA4 also read a page's unwritten part: it must hold finite
numbers, as ``PagedCache`` on CUDA does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from importlib import import_module
from inspect import signature
from typing import Any, NamedTuple

import torch

from attention.formats import cast
from attention.kernels.base import Kernel, layer_ranges
from attention.kernels.cuda_packages import (
    Lengths,
    capability,
    import_refusal,
    is_installed,
    page_size_refusal,
    refusals,
    window_of,
)
from attention.patterns.base import Pattern
from attention.types import AttentionBatch, LayerCache, LayerSpec


class _Interface(ABC):
    """One of the packages.

    Attributes:
        name: what people call it.
        module: what to import.
        sinks: it takes learned sinks.
        endless: how it is told that a query sees to its left or right without end.
    """

    name: str
    module: str
    sinks: bool = False
    endless: int | None = -1

    @abstractmethod
    def refusals(self, layers: list[LayerSpec], gpu: tuple[int, int] | None, page_size: int) -> list[str]:
        """What it cannot do of what another can, on a GPU of this compute capability if there is any."""

    @abstractmethod
    def attend(
        self,
        query: torch.Tensor,
        cache: LayerCache,
        batch: AttentionBatch,
        sinks: torch.Tensor | None,
        features: dict[str, Any],
    ) -> torch.Tensor:
        """``[T, H, D]`` from ``query`` ``[T, H, D]`` of the cache's dtype."""

    @property
    def package(self) -> Any:
        """The package, imported."""
        return import_module(self.module)


class _FA3(_Interface):
    name = "FA3"
    module = "flash_attn_interface"

    def refusals(self, layers: list[LayerSpec], gpu: tuple[int, int] | None, page_size: int) -> list[str]:
        return _gpu_refusal(self.name, gpu, (9,))

    def attend(
        self,
        query: torch.Tensor,
        cache: LayerCache,
        batch: AttentionBatch,
        sinks: torch.Tensor | None,
        features: dict[str, Any],
    ) -> torch.Tensor:
        lengths = _lengths(batch)
        return self.package.flash_attn_with_kvcache(
            query,
            cache.keys,
            cache.values,
            cache_seqlens=lengths.key_lens,
            page_table=batch.page_table,
            cu_seqlens_q=lengths.query_starts,
            max_seqlen_q=lengths.longest_query,
            **features,
        )


class _FA2(_Interface):
    name = "FA2"
    module = "flash_attn"

    def refusals(self, layers: list[LayerSpec], gpu: tuple[int, int] | None, page_size: int) -> list[str]:
        return page_size_refusal(self.name, page_size, 256)

    def attend(
        self,
        query: torch.Tensor,
        cache: LayerCache,
        batch: AttentionBatch,
        sinks: torch.Tensor | None,
        features: dict[str, Any],
    ) -> torch.Tensor:
        decodes, chunks = batch.plan((FlashAttn.name, "parts"), lambda: _parts(batch))
        output = torch.empty_like(query)
        if decodes:
            # Only this function splits long sequences over the GPU.
            output[decodes.rows] = self.package.flash_attn_with_kvcache(
                query[decodes.rows].unsqueeze(1),
                cache.keys,
                cache.values,
                cache_seqlens=decodes.lengths.key_lens,
                block_table=decodes.page_table,
                **features,
            ).squeeze(1)
        if chunks:
            output[chunks.rows] = self.package.flash_attn_varlen_func(
                query[chunks.rows],
                cache.keys,
                cache.values,
                cu_seqlens_q=chunks.lengths.query_starts,
                cu_seqlens_k=chunks.lengths.key_starts,
                max_seqlen_q=chunks.lengths.longest_query,
                max_seqlen_k=chunks.lengths.longest_keys,
                block_table=chunks.page_table,
                **features,
            )
        return output


class _FA4(_Interface):
    name = "FA4"
    module = "flash_attn.cute"
    sinks = True
    endless = None

    def refusals(self, layers: list[LayerSpec], gpu: tuple[int, int] | None, page_size: int) -> list[str]:
        reasons = _gpu_refusal(self.name, gpu, (9, 10, 11))
        # Rows of a page are copied by themselves, in units of 16 numbers.
        blackwell = gpu is not None and gpu[0] > 9
        wrong = [
            layer for layer in layers if layer.head_size % 16 or (blackwell and 128 < layer.head_size != 256)
        ]
        if wrong:
            sizes = " and ".join(map(str, sorted({layer.head_size for layer in wrong})))
            reasons.append(
                f"FA4 takes head sizes that are multiples of 16{' up to 128, or 256' if blackwell else ''}, "
                f"not {sizes} ({layer_ranges(wrong)})"
            )
        if gpu and not {"page_table", "learnable_sink", "max_seqlen_q"} <= set(
            signature(self.package.flash_attn_varlen_func).parameters
        ):
            reasons.append("FA4 is too old to read pages; pip install --upgrade 'longspan[flash]'")
        return reasons

    def attend(
        self,
        query: torch.Tensor,
        cache: LayerCache,
        batch: AttentionBatch,
        sinks: torch.Tensor | None,
        features: dict[str, Any],
    ) -> torch.Tensor:
        lengths = _lengths(batch)
        output = self.package.flash_attn_varlen_func(
            query,
            cache.keys,
            cache.values,
            cu_seqlens_q=lengths.query_starts,
            max_seqlen_q=lengths.longest_query,
            max_seqlen_k=lengths.longest_keys,
            seqused_k=lengths.key_lens,
            page_table=batch.page_table,
            learnable_sink=sinks,
            **features,
        )
        return output[0] if isinstance(output, tuple) else output


_INTERFACES: tuple[_Interface, ...] = (_FA3(), _FA2(), _FA4())


class FlashAttn(Kernel):
    """The first installed interface that can compute the layers."""

    name = "flash_attn"

    def unsupported(
        self,
        layers: list[LayerSpec],
        device: torch.device,
        dtype: torch.dtype,
        page_size: int,
        pattern: Pattern,
    ) -> list[str]:
        """See ``Kernel.unsupported``."""
        reasons = refusals(self.name, layers, device, dtype, pattern, softcap=True, sinks=True)
        installed = [interface for interface in _INTERFACES if is_installed(interface.module)]
        if not installed:
            reasons.append(
                "flash_attn is not installed; pip install 'longspan[flash]', or build flash-attn from source"
            )
        lacks = []
        for interface in installed:
            if not (found := _refusals(interface, layers, device, page_size)):
                return reasons
            lacks += found
        return reasons + lacks

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
        """See ``Kernel.forward``."""
        key = (self.name, replace(layer, index=0))
        interface: _Interface = batch.plan(key, lambda: _choose(layer, query.device, batch.page_size))
        window = window_of(layer, pattern)
        features = {
            "softmax_scale": layer.scale,
            "causal": True,
            # How far a query sees to the left and to the right of itself.
            "window_size": (interface.endless,) * 2 if window is None else (window - 1, 0),
            "softcap": layer.softcap or 0.0,
        }
        output = interface.attend(cast(query, cache.keys.dtype), cache, batch, sinks, features)
        return output.to(query.dtype)


def _refusals(
    interface: _Interface, layers: list[LayerSpec], device: torch.device, page_size: int
) -> list[str]:
    gpu = capability(device)
    # Without a GPU the package need not be imported to be refused.
    if gpu and (broken := import_refusal(interface.name, interface.module)):
        return broken
    reasons = interface.refusals(layers, gpu, page_size)
    if not interface.sinks and (wrong := [layer for layer in layers if layer.sinks]):
        reasons.append(f"{interface.name} lacks learned sinks ({layer_ranges(wrong)})")
    return reasons


def _choose(layer: LayerSpec, device: torch.device, page_size: int) -> _Interface:
    """The first that can; there is one, since ``unsupported`` has found it."""
    return next(
        interface
        for interface in _INTERFACES
        if is_installed(interface.module) and not _refusals(interface, [layer], device, page_size)
    )


def _gpu_refusal(name: str, gpu: tuple[int, int] | None, majors: tuple[int, ...]) -> list[str]:
    if gpu is None or gpu[0] in majors:
        return []
    names = " or ".join(f"{major}.x" for major in majors)
    return [f"{name} reads pages on compute capability {names}, this device has {gpu[0]}.{gpu[1]}"]


def _lengths(batch: AttentionBatch) -> Lengths:
    def build() -> Lengths:
        counts = [batch.query_len(b) for b in range(batch.size)]
        return Lengths.build(counts, batch.seq_lens, batch.page_table.device)

    return batch.plan((FlashAttn.name, "lengths"), build)


class _Part(NamedTuple):
    """Some of the batch's sequences: their query rows, lengths and rows of the page table."""

    rows: torch.Tensor | slice
    lengths: Lengths
    page_table: torch.Tensor


def _parts(batch: AttentionBatch) -> tuple[_Part | None, _Part | None]:
    """Decodes and chunks."""
    decodes = [b for b in range(batch.size) if batch.query_len(b) == 1]
    chunks = [b for b in range(batch.size) if batch.query_len(b) > 1]
    return _part(batch, decodes), _part(batch, chunks)


def _part(batch: AttentionBatch, sequences: list[int]) -> _Part | None:
    if not sequences:
        return None
    if len(sequences) == batch.size:
        return _Part(slice(None), _lengths(batch), batch.page_table)
    device = batch.page_table.device
    rows = [row for b in sequences for row in range(batch.query_starts[b], batch.query_starts[b + 1])]
    counts = [batch.query_len(b) for b in sequences]
    lengths = Lengths.build(counts, [batch.seq_lens[b] for b in sequences], device)
    table = batch.page_table[torch.tensor(sequences, device=device)]
    return _Part(torch.tensor(rows, device=device), lengths, table)
