"""Refusals and batch layouts that kernels which call a CUDA package share."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import find_spec
from itertools import accumulate
from typing import NamedTuple

import torch

from attention.batch import AttentionBatch
from attention.dtypes import dtype_name
from attention.kernels.base import layer_ranges, locate
from attention.patterns.base import Pattern
from attention.patterns.sliding_window import SlidingWindow
from attention.step import StepBatch
from attention.transfer import to_device
from attention.types import LayerSpec

_DTYPES = (torch.float16, torch.bfloat16)


def capability(device: torch.device) -> tuple[int, int] | None:
    """The GPU's compute capability; ``None`` where there is no CUDA."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


def refusals(
    name: str,
    layers: list[LayerSpec],
    device: torch.device,
    dtype: torch.dtype,
    pattern: Pattern,
    *,
    softcap: bool = False,
    sinks: bool = False,
) -> list[str]:
    """The reasons that all flash-attention kernels have for ``Kernel.unsupported``.

    Args:
        name: the kernel's name.
        layers: the model's attention layers.
        device: where the cache lives.
        dtype: dtype of the cache.
        pattern: which cached tokens a query may see.
        softcap: the kernel caps logits.
        sinks: the kernel takes learned sinks.
    """
    reasons = []
    found = capability(device)
    if found is None:
        reasons.append(f"{name} computes on a CUDA device, not on {device.type}")
    elif found < (8, 0):
        reasons.append(f"{name} needs compute capability 8.0, this device has {found[0]}.{found[1]}")
    if dtype not in _DTYPES:
        reasons.append(f"{name} computes in float16 or bfloat16, not {dtype_name(dtype)}")
    if isinstance(pattern, SlidingWindow) and pattern.sinks:
        reasons.append(f"{name} computes sliding_window without sinks only, not with sinks={pattern.sinks}")
    elif not _windowed(pattern):
        reasons.append(f"{name} cannot compute {pattern.name}")
    if wrong := [layer for layer in layers if layer.head_size % 8 or layer.head_size > 256]:
        sizes = " and ".join(map(str, sorted({layer.head_size for layer in wrong})))
        reasons.append(
            f"{name} takes head sizes that are multiples of 8 up to 256, not {sizes} ({layer_ranges(wrong)})"
        )
    if wrong := [layer for layer in layers if layer.value_size != layer.head_size]:
        reasons.append(f"{name} takes values of the keys' head size only ({layer_ranges(wrong)})")
    if not softcap and (wrong := [layer for layer in layers if layer.softcap is not None]):
        reasons.append(f"{name} lacks soft-capping ({layer_ranges(wrong)})")
    if not sinks and (wrong := [layer for layer in layers if layer.sinks]):
        reasons.append(f"{name} lacks learned sinks ({layer_ranges(wrong)})")
    return reasons


def page_size_refusal(name: str, page_size: int, multiple: int) -> list[str]:
    """The reason, if ``name`` only reads pages whose size is a multiple of ``multiple``."""
    if page_size % multiple == 0:
        return []
    nearest = max(1, round(page_size / multiple)) * multiple
    return [
        f"{name} reads pages of a multiple of {multiple} tokens, not {page_size}; choose page size {nearest}"
    ]


def _windowed(pattern: Pattern) -> bool:
    """Whether a query sees all tokens before it up to some distance, which the packages call a window."""
    return pattern.dense or (isinstance(pattern, SlidingWindow) and not pattern.sinks)


def window_of(layer: LayerSpec, pattern: Pattern) -> int | None:
    """How many tokens a query sees, counted back from itself; ``None``: all.

    Only for patterns that ``refusals`` does not refuse.
    """
    windows = [layer.window, pattern.window if isinstance(pattern, SlidingWindow) else None]
    return min((window for window in windows if window is not None), default=None)


def is_installed(module: str) -> bool:
    """Whether there is such a module. Imports nothing, since these packages load CUDA libraries on import.

    A folder that only holds other packages, such as ``flash_attn`` with only ``cute`` in it, is no module.
    """
    parent, _, child = module.partition(".")
    spec = find_spec(parent)
    if spec is not None and child:
        spec = PathFinder.find_spec(module, spec.submodule_search_locations)
    return spec is not None and spec.origin is not None


def import_refusal(name: str, module: str) -> list[str]:
    """The reason, if ``module`` is installed but does not fit this machine."""
    try:
        import_module(module)
    except Exception as error:  # a library that was built for another torch can raise anything
        described = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
        return [f"{name} is installed but cannot be imported: {described}"]
    return []


class Lengths(NamedTuple):
    """Consecutive sequences in the form that these packages take.

    Attributes:
        query_starts: int32 ``[N + 1]``, on the device.
        key_starts: int32 ``[N + 1]``, likewise for keys that lie one sequence after the other.
        key_lens: int32 ``[N]``.
        longest_query: most query tokens of a sequence.
        longest_keys: most keys of a sequence.
    """

    query_starts: torch.Tensor
    key_starts: torch.Tensor
    key_lens: torch.Tensor
    longest_query: int
    longest_keys: int

    @classmethod
    def build(cls, query_lens: Sequence[int], key_lens: Sequence[int], device: torch.device) -> Lengths:
        """Builds it from host integers, one of each for every sequence."""
        starts = [list(accumulate(lens, initial=0)) for lens in (query_lens, key_lens)]
        numbers = torch.tensor([*starts, [*key_lens, 0]], dtype=torch.int32)
        query_starts, key_starts, lens = to_device(numbers, device).unbind()
        return cls(query_starts, key_starts, lens[:-1], max(query_lens), max(key_lens))


def begins(host: StepBatch, sequences: Sequence[int], window: int | None) -> list[int]:
    """For each of ``sequences``, the first token that a query of the step sees."""
    if window is None:
        return [0] * len(sequences)
    return [max(0, host.seq_lens[b] - host.query_len(b) + 1 - window) for b in sequences]


def gathered(
    batch: AttentionBatch, sequences: Sequence[int], window: int | None
) -> tuple[torch.Tensor, Lengths]:
    """The slots of all tokens that ``sequences`` see, one sequence after the other.

    Args:
        batch: the step's batch.
        sequences: indices into it.
        window: see ``window_of``.

    Returns:
        Slots in the cache, int64 ``[L]``, and their lengths. A query's distance to the end of its
        sequence's keys does not change.
    """
    host, device = batch.host, batch.device.page_table.device
    first = begins(host, sequences, window)
    lens = [host.seq_lens[b] - begin for b, begin in zip(sequences, first, strict=True)]
    lengths = Lengths.build([host.query_len(b) for b in sequences], lens, device)
    which = to_device(torch.tensor([list(sequences), first]), device)
    owners = torch.repeat_interleave(lengths.key_lens, output_size=sum(lens))
    at = torch.arange(sum(lens), device=device) - lengths.key_starts[owners] + which[1][owners]
    return locate(batch.device, which[0][owners], at)[0], lengths


def gather(pages: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The tokens ``[L, Hkv, D]`` of ``pages`` ``[P, page_size, Hkv, D]`` that lie at ``slots``."""
    return pages.flatten(0, 1).index_select(0, slots)
