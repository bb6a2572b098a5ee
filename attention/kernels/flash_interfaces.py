"""The interfaces of the flash-attn packages.

Three interfaces have that name and may be installed side by side. They are tried in this order: FA3
(``flash_attn_interface``, Hopper only), FA2 (``flash_attn``), FA4 (``flash_attn.cute``, Hopper and Blackwell,
no split over the keys yet). All of them align causality and windows with the last key: a chunk's queries are
the sequence's last tokens, as here.

They multiply masked values by zero, and FA3 and FA4 also read a page's unwritten part: it must hold finite
numbers, as ``PagedCache`` on CUDA does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import import_module
from inspect import signature
from typing import Any, NamedTuple

import torch

from attention.kernels.base import layer_ranges
from attention.kernels.cuda_packages import Lengths, capability, import_refusal, page_size_refusal
from attention.types import LayerCache, LayerSpec


class Part(NamedTuple):
    """Some of a step's sequences, for one call.

    Attributes:
        rows: their query rows: int64 ``[R]`` on the device, or all of them as a slice.
        lengths: of the sequences.
        page_table: their rows of it.
    """

    rows: torch.Tensor | slice
    lengths: Lengths
    page_table: torch.Tensor


class Interface(ABC):
    """One of the packages.

    Attributes:
        name: its common name.
        module: to import.
        sinks: its argument for learned sinks, if it takes them.
        endless: its value for a window without limit to one side.
        mixes: one call takes both decodes and chunks.
    """

    name: str
    module: str
    sinks: str | None = None
    endless: int | None = -1
    mixes: bool = True

    @abstractmethod
    def refusals(self, layers: list[LayerSpec], gpu: tuple[int, int] | None, page_size: int) -> list[str]:
        """The reasons that only this interface has, on a GPU of this compute capability if there is any."""

    @abstractmethod
    def attend(
        self, query: torch.Tensor, cache: LayerCache, part: Part, features: dict[str, Any]
    ) -> torch.Tensor:
        """``[R, H, D]`` from the part's ``query`` ``[R, H, D]``, of the cache's dtype."""

    @property
    def package(self) -> Any:
        """The package, imported."""
        return import_module(self.module)


class _FA3(Interface):
    name = "FA3"
    module = "flash_attn_interface"

    def refusals(self, layers: list[LayerSpec], gpu: tuple[int, int] | None, page_size: int) -> list[str]:
        return _gpu_refusal(self.name, gpu, (9,))

    def attend(
        self, query: torch.Tensor, cache: LayerCache, part: Part, features: dict[str, Any]
    ) -> torch.Tensor:
        lengths = part.lengths
        return self.package.flash_attn_with_kvcache(
            query,
            cache.keys,
            cache.values,
            cache_seqlens=lengths.key_lens,
            page_table=part.page_table,
            cu_seqlens_q=lengths.query_starts,
            max_seqlen_q=lengths.longest_query,
            **features,
        )


class _FA2(Interface):
    name = "FA2"
    module = "flash_attn"
    mixes = False

    def refusals(self, layers: list[LayerSpec], gpu: tuple[int, int] | None, page_size: int) -> list[str]:
        return page_size_refusal(self.name, page_size, 256)

    def attend(
        self, query: torch.Tensor, cache: LayerCache, part: Part, features: dict[str, Any]
    ) -> torch.Tensor:
        lengths = part.lengths
        if lengths.longest_query == 1:
            # Only this function splits long sequences over the GPU.
            return self.package.flash_attn_with_kvcache(
                query.unsqueeze(1),
                cache.keys,
                cache.values,
                cache_seqlens=lengths.key_lens,
                block_table=part.page_table,
                **features,
            ).squeeze(1)
        return self.package.flash_attn_varlen_func(
            query,
            cache.keys,
            cache.values,
            cu_seqlens_q=lengths.query_starts,
            cu_seqlens_k=lengths.key_starts,
            max_seqlen_q=lengths.longest_query,
            max_seqlen_k=lengths.longest_keys,
            block_table=part.page_table,
            **features,
        )


class _FA4(Interface):
    name = "FA4"
    module = "flash_attn.cute"
    sinks = "learnable_sink"
    endless = None

    def refusals(self, layers: list[LayerSpec], gpu: tuple[int, int] | None, page_size: int) -> list[str]:
        reasons = _gpu_refusal(self.name, gpu, (9, 10, 11))
        # Rows of a page are copied one by one, in units of 16 numbers.
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
        self, query: torch.Tensor, cache: LayerCache, part: Part, features: dict[str, Any]
    ) -> torch.Tensor:
        lengths = part.lengths
        output = self.package.flash_attn_varlen_func(
            query,
            cache.keys,
            cache.values,
            cu_seqlens_q=lengths.query_starts,
            max_seqlen_q=lengths.longest_query,
            max_seqlen_k=lengths.longest_keys,
            seqused_k=lengths.key_lens,
            page_table=part.page_table,
            **features,
        )
        return output[0] if isinstance(output, tuple) else output


INTERFACES: tuple[Interface, ...] = (_FA3(), _FA2(), _FA4())


def refusals_of(
    interface: Interface, layers: list[LayerSpec], device: torch.device, page_size: int
) -> list[str]:
    """All reasons why an interface cannot compute these layers, besides those that all packages share."""
    gpu = capability(device)
    # Without a GPU the package need not be imported to be refused.
    if gpu and (broken := import_refusal(interface.name, interface.module)):
        return broken
    reasons = interface.refusals(layers, gpu, page_size)
    if interface.sinks is None and (wrong := [layer for layer in layers if layer.sinks]):
        reasons.append(f"{interface.name} lacks learned sinks ({layer_ranges(wrong)})")
    return reasons


def _gpu_refusal(name: str, gpu: tuple[int, int] | None, majors: tuple[int, ...]) -> list[str]:
    if gpu is None or gpu[0] in majors:
        return []
    names = " or ".join(f"{major}.x" for major in majors)
    return [f"{name} reads pages on compute capability {names}, this device has {gpu[0]}.{gpu[1]}"]
