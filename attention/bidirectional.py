"""Attention of encoders: a token sees all of its own text, in a flattened batch without padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from attention.registry import UnsupportedError


class _Group(NamedTuple):
    """Neighboring texts of one length."""

    begin: int
    texts: int
    length: int


class Bidirectional:
    """What a model's forward takes as ``longspan`` for a flattened batch of texts.

    Texts of one length are one call of torch's SDPA where they are neighbors, so a batch that is sorted by
    length takes as many calls as it has lengths.

    Args:
        lengths: of the texts, in tokens, in the order of the batch.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self._groups: list[_Group] = []
        begin = 0
        for length, alike in groupby(lengths):
            count = len(list(alike))
            self._groups.append(_Group(begin, count, length))
            begin += count * length
        self._near: dict[tuple[int, int], torch.Tensor] = {}
        self._bias: tuple[torch.Tensor, dict[int, torch.Tensor]] | None = None

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        features: Mapping[str, Any],
    ) -> torch.Tensor:
        """See ``attention.forward.Attend.attend``. ``sliding_window`` w among the features: ``|i - j| < w``.

        ``position_bias`` ``[H, 2 N - 1]`` among them is added to the logits: that of a key ``d`` tokens after
        the query at ``N - 1 + d`` (T5: Raffel et al. 2020, section 2.1). Texts have ``N`` tokens at most.

        Raises:
            UnsupportedError: the model insists on a mask.
        """
        if mask is not None:
            raise UnsupportedError("the model gives its attention a mask of its own")
        _, heads, tokens, _ = query.shape
        output = query.new_empty(tokens, heads, value.shape[-1])
        for begin, count, length in self._groups:
            rows = slice(begin, begin + count * length)
            # [H, texts, length, D]: SDPA takes the heads as its batch and the texts as its heads.
            q, k, v = (x[0, :, rows].unflatten(1, (count, length)) for x in (query, key, value))
            if len(k) != heads:
                k, v = (x.repeat_interleave(heads // len(x), 0) for x in (k, v))
            added = self._near_mask(features.get("sliding_window"), length, query.device)
            if (table := features.get("position_bias")) is not None:
                bias = self._bias_of(table, length)
                added = bias if added is None else bias.masked_fill(~added, -torch.inf)
            attended = scaled_dot_product_attention(q, k, v, attn_mask=added, scale=features.get("scaling"))
            output[rows].unflatten(0, (count, length)).copy_(attended.permute(1, 2, 0, 3))
        return output[None]

    def _near_mask(self, window: int | None, length: int, device: torch.device) -> torch.Tensor | None:
        """Which tokens of a text see which, ``[length, length]``; ``None`` for all."""
        if window is None or window >= length:
            return None
        if (window, length) not in self._near:
            places = torch.arange(length, device=device)
            self._near[window, length] = (places[:, None] - places).abs() < window
        return self._near[window, length]

    def _bias_of(self, table: torch.Tensor, length: int) -> torch.Tensor:
        """The bias of a text's tokens, ``[H, 1, length, length]``; kept for layers that share a table."""
        if self._bias is None or self._bias[0] is not table:
            self._bias = table, {}
        kept = self._bias[1]
        if length not in kept:
            places = torch.arange(length, device=table.device)
            kept[length] = table[:, places - places[:, None] + table.shape[1] // 2][:, None]
        return kept[length]
