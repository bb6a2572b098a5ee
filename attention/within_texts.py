"""Attention within each text of a flattened batch without padding, as encoders and embedders compute it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from attention.forward import LayerCall
from attention.registry import UnsupportedError

# Tensors that change nothing: positions are in queries and keys already.
_HARMLESS = {"position_ids"}
# Of queries, keys and heads that are computed at once: 64 MB in float32.
_MOST_BIASES = 1 << 24


class _Group(NamedTuple):
    """Neighboring texts of one length."""

    begin: int
    texts: int
    length: int


class WithinTexts:
    """The attention of a flattened batch of texts, which a model's forward takes as ``longspan``.

    Texts of one length are one call of torch's SDPA where they are neighbors, so a batch that is sorted by
    length takes as many calls as it has lengths.

    Args:
        lengths: of the texts, in tokens, in the order of the batch.
        causal: a token sees itself and those before it; else all of its text.
    """

    def __init__(self, lengths: Sequence[int], *, causal: bool) -> None:
        self._causal = causal
        self._groups: list[_Group] = []
        begin = 0
        for length, alike in groupby(lengths):
            count = len(list(alike))
            self._groups.append(_Group(begin, count, length))
            begin += count * length
        self._masks: dict[tuple[int, int], torch.Tensor] = {}
        self._bias: tuple[torch.Tensor, dict[int, torch.Tensor]] | None = None

    def attend(self, call: LayerCall) -> torch.Tensor:
        """See ``attention.forward.Attend.attend``.

        ``sliding_window`` w among the features: ``|i - j| < w``. ``position_bias`` ``[H, 2 N - 1]`` among
        them is added to the logits where tokens see all of their text: that of a key ``d`` tokens after the
        query at ``N - 1 + d`` (T5: Raffel et al. 2020, section 2.1). Texts have ``N`` tokens at most.

        Raises:
            UnsupportedError: the model asks for something else beside, such as a mask.
        """
        _, query, key, value, mask, features = call
        _check(mask, features, biased=not self._causal)
        _, heads, tokens, _ = query.shape
        output = query.new_empty(tokens, heads, value.shape[-1])
        for begin, count, length in self._groups:
            rows = slice(begin, begin + count * length)
            # [H, texts, length, D]: SDPA takes the heads as its batch and the texts as its heads.
            q, k, v = (x[0, :, rows].unflatten(1, (count, length)) for x in (query, key, value))
            if len(k) != heads:
                k, v = (x.repeat_interleave(heads // len(x), 0) for x in (k, v))
            near = self._near(features.get("sliding_window"), length, query.device)
            table = features.get("position_bias")
            # With biases some queries at a time: a bias for each pair of a long text takes gigabytes.
            block = length if table is None else max(1, _MOST_BIASES // (heads * length))
            into = output[rows].unflatten(0, (count, length))
            for first in range(0, length, block):
                asked = slice(first, min(first + block, length))
                added = near
                if table is not None:
                    added = self._bias_of(table, length, asked)
                    if near is not None:
                        added = added.masked_fill(~near[asked], -torch.inf)
                attended = scaled_dot_product_attention(
                    q[:, :, asked],
                    k,
                    v,
                    attn_mask=added,
                    is_causal=self._causal and added is None,
                    scale=features.get("scaling"),
                )
                into[:, asked].copy_(attended.permute(1, 2, 0, 3))
        return output[None]

    def _near(self, window: int | None, length: int, device: torch.device) -> torch.Tensor | None:
        """Which tokens of a text see which within a window, ``[length, length]``; ``None`` for all."""
        if window is None or window >= length:
            return None
        if (window, length) not in self._masks:
            places = torch.arange(length, device=device)
            distances = places[:, None] - places
            near = distances.abs() < window
            self._masks[window, length] = near & (distances >= 0) if self._causal else near
        return self._masks[window, length]

    def _bias_of(self, table: torch.Tensor, length: int, asked: slice) -> torch.Tensor:
        """The bias of some of a text's queries, ``[H, 1, queries, length]``.

        Kept for layers that share a table, where these are all.
        """
        if self._bias is None or self._bias[0] is not table:
            self._bias = table, {}
        kept = self._bias[1]
        if length in kept:
            return kept[length]
        places = torch.arange(length, device=table.device)
        bias = table[:, places - places[asked, None] + table.shape[1] // 2][:, None]
        if len(places[asked]) == length:
            kept[length] = bias
        return bias


def _check(mask: torch.Tensor | None, features: Mapping[str, Any], *, biased: bool) -> None:
    if mask is not None:
        raise UnsupportedError("the model gives its attention a mask of its own")
    if features.get("softcap"):
        raise UnsupportedError("the model caps its attention's scores (softcap), which is not computed here")
    for name, value in features.items():
        known = name in _HARMLESS or (biased and name == "position_bias")
        if isinstance(value, torch.Tensor) and not known:
            raise UnsupportedError(f"the model's attention takes {name}, which is not computed here")
