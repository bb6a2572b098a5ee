"""Proves a model as a start does."""

from __future__ import annotations

from collections.abc import Callable

import torch

from attention.backends import Attention, resolve
from server.models.loaded import LoadedModel
from server.models.prove import Proven, check_served, compute_own, prove
from server.models.recognize_layers import fuse, recognize_layers


def proven(
    loaded: LoadedModel,
    kernel: str | Callable[[LoadedModel], Attention] = "auto",
    page_size: int = 4,
    kv_dtype: torch.dtype | None = None,
    *,
    fused: bool = True,
) -> Proven:
    """Compares the model with transformers' own, and what serves with that.

    Args:
        loaded: the model as it was loaded.
        kernel: its name, or what makes attention of it.
        page_size: tokens per page.
        kv_dtype: dtype of the cache; ``None`` for the model's own.
        fused: let lean layers take their places.
    """
    kv_dtype = kv_dtype or loaded.dtype
    if isinstance(kernel, str):
        attention = resolve("full", {}, kernel, loaded.layers, "cpu", kv_dtype, page_size)
    else:
        attention = kernel(loaded)
    own = compute_own(loaded, page_size)
    if fused:
        fuse(recognize_layers(loaded.model))
    strictly = prove(loaded, own, attention, page_size)
    check_served(loaded, strictly, attention, page_size, kv_dtype, weights="float", packed=False)
    return strictly
