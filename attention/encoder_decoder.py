"""Attention of an encoder-decoder over pages: writing a source's keys and values, and a step of the decoder.

A source's pages hold, in each layer, the keys and values of cross-attention; the pages after them those of
the decoder's own tokens. In cross-attention a query sees all tokens of its source. To a kernel that is a
decode at the source's last position, so every query row is a sequence of its own there, over the source's
pages, and any kernel computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from attention.backends import Attention, UnsupportedError
from attention.batch import AttentionBatch
from attention.cache import PagedCache
from attention.forward import LayerCall
from attention.kernels.step_plans import StepPlans
from attention.relative_bias import RelativeBias
from attention.roles import Roles

# Rows of cross-attention in one call of a kernel: some gather each row's keys.
_ROWS = 64


class SourceWriter:
    """The object that writes sources' keys and values, which the decoder's forward takes as ``longspan``.

    Only its calls of cross-attention matter; the output is of no use.

    Args:
        attention: pattern and kernel.
        cache: keys and values of all layers.
        roles: of the model's attention modules.
        slots: int64 ``[S]``, of the tokens whose vectors the decoder is given as the encoder's.
    """

    def __init__(self, attention: Attention, cache: PagedCache, roles: Roles, slots: torch.Tensor) -> None:
        self._attention, self._cache, self._roles, self._slots = attention, cache, roles, slots

    def attend(self, call: LayerCall) -> torch.Tensor:
        """See ``attention.forward.Attend.attend``."""
        module, query, key, value, *_ = call
        if module in self._roles.cross:
            layer = self._cache.layers[module.layer_idx]
            self._attention.write(layer, self._slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])


class DecoderStep:
    """The attention of a step, which the decoder's forward takes as ``longspan``.

    Args:
        attention: pattern and kernel.
        cache: keys and values of all layers; the step's own are written as layers run.
        roles: of the model's attention modules.
        batch: the decoder's tokens: positions, and the pages from that of the decoder's first token on.
        sources: for each sequence of the batch, its source's tokens.
        pages: for each sequence of the batch, its source's pages.
    """

    def __init__(
        self,
        attention: Attention,
        cache: PagedCache,
        roles: Roles,
        batch: AttentionBatch,
        sources: Sequence[int],
        pages: Sequence[Sequence[int]],
    ) -> None:
        self._attention, self._cache, self._roles, self._batch = attention, cache, roles, batch
        self._plans = attention.plans(batch)
        self._bias = RelativeBias(batch) if roles.biased else None
        self._cross: list[tuple[slice, StepPlans[Any]]] = []
        owners = batch.host.owners.tolist()
        for first in range(0, len(owners), _ROWS):
            part = owners[first : first + _ROWS]
            lengths = [sources[b] for b in part]
            over = AttentionBatch.build(
                [length - 1 for length in lengths],
                [1] * len(part),
                [pages[b] for b in part],
                batch.host.page_size,
                batch.device.slots.device,
                prompt_lens=lengths,
            )
            self._cross.append((slice(first, first + len(part)), attention.plans(over)))

    def attend(self, call: LayerCall) -> torch.Tensor:
        """See ``attention.forward.Attend.attend``. In cross-attention ``key`` and ``value`` are not used.

        Raises:
            UnsupportedError: the model insists on a mask.
        """
        module, query, key, value, mask, features = call
        if mask is not None:
            raise UnsupportedError("the model gives its attention a mask of its own")
        layer = self._roles.layers[module.layer_idx]
        cache, rows = self._cache.layers[layer.index], query[0].transpose(0, 1)
        if module in self._roles.cross:
            parts = [self._attention.forward(layer, rows[part], cache, plans) for part, plans in self._cross]
            return torch.cat(parts)[None]
        slots = self._batch.device.slots
        self._attention.write(cache, slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
        if self._bias is None:
            return self._attention.forward(layer, rows, cache, self._plans)[None]
        return self._bias.attend(layer, rows, cache, features["position_bias"])[None]
