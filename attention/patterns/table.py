"""What patterns say of few positions, as decodes ask in every step, looked up in what they said of many.

A pattern's rule is some ten calls of torch. Between the weights of two steps a call finds nothing of itself
in the processor's caches, and takes 20 to 90 microseconds for a handful of numbers. As a rule knows nothing
but positions, it is asked for a stretch of them at once, and the next steps need not ask.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch

from attention.patterns.base import ContentPattern, Pattern

# Positions that are asked for at once, and positions from which on asking is faster than looking up.
_STRETCH = 64
_MANY = 16

# Stretches that are kept: each sequence is in one, and a server's sequences are at most some hundred.
_KEPT = 1024

Array = np.ndarray


def spans_at(pattern: Pattern, positions: Array) -> Array:
    """``pattern.spans`` at int64 ``[N]``: int64 ``[N, K, 2]``."""
    if len(positions) < _MANY:
        found = [_spans(pattern, at // _STRETCH)[at % _STRETCH] for at in positions.tolist()]
        if len({len(spans) for spans in found}) == 1:
            return np.array(found)
    return pattern.spans(torch.from_numpy(positions)).numpy()


def chooses_at(pattern: ContentPattern, positions: Array, prompt_lens: Array) -> Array:
    """``pattern.chooses`` at int64 ``[N]``, of sequences of such prompts, int64 ``[N]``: bool ``[N]``."""
    if len(positions) < _MANY:
        asked = _asked(positions, prompt_lens)
        found = [_chooses(pattern, given, at // _STRETCH)[at % _STRETCH] for at, given in asked]
        return np.array(found, dtype=bool)
    return pattern.chooses(torch.from_numpy(positions), torch.from_numpy(prompt_lens)).numpy()


def pages_chosen_at(pattern: ContentPattern, positions: Array, prompt_lens: Array, page_size: int) -> Array:
    """``pattern.pages_chosen`` likewise: int64 ``[N]``."""
    if len(positions) < _MANY:
        asked = _asked(positions, prompt_lens)
        found = [_pages(pattern, given, page_size, at // _STRETCH)[at % _STRETCH] for at, given in asked]
        return np.array(found, dtype=np.int64)
    lens = torch.from_numpy(prompt_lens)
    return pattern.pages_chosen(torch.from_numpy(positions), lens, page_size).numpy()


def _asked(positions: Array, prompt_lens: Array) -> Sequence[tuple[int, int]]:
    return list(zip(positions.tolist(), prompt_lens.tolist(), strict=True))


@functools.lru_cache(_KEPT)
def _spans(pattern: Pattern, number: int) -> Array:
    return pattern.spans(_stretch(number)).numpy()


@functools.lru_cache(_KEPT)
def _chooses(pattern: ContentPattern, prompt_len: int, number: int) -> Array:
    positions = _stretch(number)
    return pattern.chooses(positions, torch.full_like(positions, prompt_len)).numpy()


@functools.lru_cache(_KEPT)
def _pages(pattern: ContentPattern, prompt_len: int, page_size: int, number: int) -> Array:
    positions = _stretch(number)
    return pattern.pages_chosen(positions, torch.full_like(positions, prompt_len), page_size).numpy()


def _stretch(number: int) -> torch.Tensor:
    return torch.arange(number * _STRETCH, (number + 1) * _STRETCH)
