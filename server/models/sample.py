"""Logits that are kept with a packed model, so that a later start knows whether it still computes them."""

from __future__ import annotations

import torch

from attention.backends import Attention, resolve
from server.models.difference import relative_error
from server.models.loaded import LoadedModel
from server.models.logits import paged_logits, sequences_of
from server.models.non_finite import check_held

# Tokens of the longer sequence: a start should not wait for more.
_TOKENS = 40
# A packed model from one start to the next. Kernels, machines and caches add numbers in another order, which
# rounds activations halfway between two codes the other way; over all layers that amounts to the rounding of
# activations itself: 0.018 to 0.053 were measured, with any kernel, level of native code and dtype of the
# cache.
_TOLERANCE = 0.15
# Added by a cache of 8 bits.
_EIGHT_BIT_CACHE_TOLERANCE = 0.5
# The share of positions that must stay within it.
_SHARE = 0.75
# Logits of a position that are kept to compare by.
_COLUMNS = 4096


def sample_logits(
    loaded: LoadedModel, attention: Attention, page_size: int, kv_dtype: torch.dtype
) -> torch.Tensor:
    """Logits ``[T, V]`` of two short sequences through the paged cache; arguments as of ``paged_logits``.

    Raises:
        RefusedError: the cache cannot hold the model's keys and values.
    """
    logits = torch.cat(paged_logits(loaded, attention, page_size, kv_dtype, sequences_of(loaded, _TOKENS)))
    check_held(loaded, logits, kv_dtype)
    return logits


def oracle_logits(loaded: LoadedModel) -> torch.Tensor:
    """``sample_logits`` by the reference kernel over a cache that rounds nothing, ``[T, at most 8191]``.

    Evenly spread over the vocabulary where that is larger.
    """
    attention = resolve("full", {}, "reference", loaded.layers, loaded.model.device, loaded.dtype, 16)
    return _spread(sample_logits(loaded, attention, 16, loaded.dtype))


def differs(kept: torch.Tensor, now: torch.Tensor, *, kv_dtype: torch.dtype = torch.float32) -> str:
    """Compares what a packed model computes now with what it did when it was proven.

    Args:
        kept: its ``oracle_logits``.
        now: its ``sample_logits`` by any kernel over any cache.
        kv_dtype: dtype of the cache that ``now`` was computed over.

    Returns:
        How they differ, part of a sentence; empty if only as rounding can.
    """
    now = _spread(now)
    if now.shape != kept.shape:
        return f"it gives {list(now.shape)} logits instead of {list(kept.shape)}"
    tolerance = _EIGHT_BIT_CACHE_TOLERANCE if kv_dtype.itemsize == 1 else _TOLERANCE
    error = float(relative_error(now, kept).quantile(_SHARE))
    if error <= tolerance:
        return ""
    return (
        f"its logits differ by {error:.2g} of their standard deviation from those that were proven (up to "
        f"{tolerance:g} is rounding)"
    )


def _spread(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, :: max(1, logits.shape[1] // _COLUMNS)].float()
