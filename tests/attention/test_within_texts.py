"""Attention within texts with a bias by distance, a few queries at a time."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attention import within_texts
from attention.forward import LayerCall
from attention.within_texts import WithinTexts

HEADS, SIZE, LENGTHS = 3, 8, (2, 9, 9, 40)


class _Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else [result]:
            if isinstance(made, torch.Tensor) and made.untyped_storage().nbytes():
                self.elements = max(self.elements, made.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize("window", [None, 6])
def test_biases_of_a_long_text_are_made_for_some_queries_at_a_time(window, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    total = sum(LENGTHS)
    q, k, v = torch.randn(3, 1, HEADS, total, SIZE, generator=generator)
    table = torch.randn(HEADS, 2 * max(LENGTHS) - 1, generator=generator)
    features = {"position_bias": table, "sliding_window": window, "scaling": 1.0}
    expected, begin = [], 0
    for length in LENGTHS:
        rows = slice(begin, begin + length)
        back = torch.arange(length) - torch.arange(length)[:, None]
        logits = q[0, :, rows] @ k[0, :, rows].mT + table[:, back + max(LENGTHS) - 1]
        if window is not None:
            logits = logits.masked_fill(back.abs() >= window, -torch.inf)
        expected.append((logits.softmax(-1) @ v[0, :, rows]).transpose(0, 1))
        begin += length
    for most in (1 << 24, 2 * HEADS * 40 + 7, 1):
        monkeypatch.setattr(within_texts, "_MOST_BIASES", most)
        attend = WithinTexts(LENGTHS, causal=False)
        for _ in range(2):  # layers share a table
            with _Largest() as largest:
                found = attend.attend(LayerCall(None, q, k, v, None, features))
            torch.testing.assert_close(found[0], torch.cat(expected), atol=1e-5, rtol=1e-5)
        if most < 1 << 24:
            assert largest.elements < HEADS * 40 * 40
