"""The one call that computes a model's logits: when it serves, when it is read, and when it is checked."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch

from attention.registry import UnsupportedError

log = logging.getLogger("longspan.attention")


class LayerCall(NamedTuple):
    """One layer's call of attention.

    Attributes:
        module: the layer's attention module, with its ``layer_idx``.
        query: ``[1, H, T, D]``, after RoPE.
        key: ``[1, Hkv, T, D]``, after RoPE.
        value: ``[1, Hkv, T, Dv]``.
        mask: the one that the model prepared, or ``None``.
        features: the other keyword arguments of the layer's call.
    """

    module: Any
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    features: Mapping[str, Any]


class Attend(Protocol):
    """An object that a model's forward takes as ``longspan``."""

    def attend(self, call: LayerCall) -> torch.Tensor:
        """One layer's attention.

        Returns:
            ``[1, T, H, Dv]``, contiguous: some layers view it otherwise.
        """


# Some models' layers don't hand their keyword arguments on to their attention.
_attending: ContextVar[Attend | None] = ContextVar("attending", default=None)


def attending() -> Attend | None:
    """The object that computes attention in the running ``forward``."""
    return _attending.get()


@contextmanager
def attending_with(attend: Attend) -> Iterator[None]:
    """Has an object compute the attention of models that are called meanwhile."""
    before = _attending.set(attend)
    try:
        yield
    finally:
        _attending.reset(before)


def forward(
    model: Any,
    ids: torch.Tensor,
    positions: torch.Tensor,
    attend: Attend,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """A model's logits of a flattened batch.

    Args:
        model: a causal language model of transformers whose attention implementation is ``longspan``, or
            one that is called as such and gives logits that are good until the next call.
        ids: int64 ``[T]``.
        positions: int64 ``[T]``.
        attend: computes attention.
        rows: int64 ``[N]``, the tokens whose logits are wanted; ``None`` for all.

    Returns:
        ``[N, V]``. If a model computes all rows regardless of the request, the wanted ones are picked here.

    Raises:
        UnsupportedError: the model gives another number of rows.
    """
    # If all rows are wanted, a model that ignores the request cannot be told from one that honors it.
    asked = None if rows is None or len(rows) == len(ids) else rows
    selection = {} if asked is None else {"logits_to_keep": asked}
    with attending_with(attend):
        logits = model(
            input_ids=ids[None], position_ids=positions[None], use_cache=False, longspan=attend, **selection
        ).logits[0]
    if asked is not None and len(logits) == len(ids):
        _note(type(model).__name__)
        return logits[asked]
    wanted = len(ids if rows is None else rows)
    if len(logits) != wanted:
        raise UnsupportedError(
            f"asked for the logits of {wanted} of {len(ids)} tokens, it gives those of {len(logits)}"
        )
    return logits[rows] if rows is not None and asked is None else logits


@cache
def _note(architecture: str) -> None:
    log.info("%s computes the logits of all tokens, however few are asked for", architecture)
