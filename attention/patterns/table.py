"""Cached results of patterns' rules at few positions, as decode steps need them.

A pattern's rule is about ten calls of torch. After a step has read all weights, the code of such a call is in
none of the processor's caches, and it takes 20 to 90 microseconds for a few numbers. Since a rule depends
only on positions, it is computed for a stretch of them at once, and the next steps look it up.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch

from attention.patterns.base import ContentPattern, Pattern

# Positions of a stretch, and how many positions are computed faster than looked up.
_STRETCH = 64
_MANY = 16

# Cached stretches: each sequence is in one, and a server has at most some hundred sequences.
_KEPT = 1024

Array = np.ndarray


def spans_at(pattern: Pattern, positions: Array) -> Array:
    """``pattern.spans`` at int64 ``[N]``: int64 ``[N, K, 2]``."""
    if len(positions) < _MANY:
        found = [_spans(pattern, at // _STRETCH)[at % _STRETCH] for at in positions.tolist()]
        if len({len(spans) for spans in found}) == 1:
            return np.array(found)
    return pattern.spans(torch.from_numpy(positions)).numpy()


def selects_at(pattern: ContentPattern, positions: Array, prompt_lens: Array) -> Array:
    """``pattern.selects`` at int64 ``[N]``, with their prompt lengths, int64 ``[N]``: bool ``[N]``."""
    if len(positions) < _MANY:
        asked = _asked(positions, prompt_lens)
        found = [_selects(pattern, given, at // _STRETCH)[at % _STRETCH] for at, given in asked]
        return np.array(found, dtype=bool)
    return pattern.selects(torch.from_numpy(positions), torch.from_numpy(prompt_lens)).numpy()


def pages_selected_at(pattern: ContentPattern, positions: Array, prompt_lens: Array, page_size: int) -> Array:
    """``pattern.pages_selected`` likewise: int64 ``[N]``."""
    if len(positions) < _MANY:
        asked = _asked(positions, prompt_lens)
        found = [_pages(pattern, given, page_size, at // _STRETCH)[at % _STRETCH] for at, given in asked]
        return np.array(found, dtype=np.int64)
    lens = torch.from_numpy(prompt_lens)
    return pattern.pages_selected(torch.from_numpy(positions), lens, page_size).numpy()


def _asked(positions: Array, prompt_lens: Array) -> Sequence[tuple[int, int]]:
    return list(zip(positions.tolist(), prompt_lens.tolist(), strict=True))


@functools.lru_cache(_KEPT)
def _spans(pattern: Pattern, number: int) -> Array:
    return pattern.spans(_stretch(number)).numpy()


@functools.lru_cache(_KEPT)
def _selects(pattern: ContentPattern, prompt_len: int, number: int) -> Array:
    positions = _stretch(number)
    return pattern.selects(positions, torch.full_like(positions, prompt_len)).numpy()


@functools.lru_cache(_KEPT)
def _pages(pattern: ContentPattern, prompt_len: int, page_size: int, number: int) -> Array:
    positions = _stretch(number)
    return pattern.pages_selected(positions, torch.full_like(positions, prompt_len), page_size).numpy()


def _stretch(number: int) -> torch.Tensor:
    return torch.arange(number * _STRETCH, (number + 1) * _STRETCH)
