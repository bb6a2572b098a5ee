"""A model whose next token depends on every token that it finds in its pages, and on nothing else.

A key in a wrong page, or one that is missing, changes the next token.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from attention.types import LayerSpec

VOCABULARY = 13
CONTEXT = 64

SMALL = {
    "seed": st.integers(0, 2**32),
    "pages": st.integers(8, 30),
    "page_size": st.integers(1, 4),
    "max_running": st.integers(1, 5),
    "extra_budget": st.integers(0, 12),
    "prefix_cache": st.booleans(),
}
"""Engines in which sequences of this model preempt one another, and the seed of their load."""
_ROWS = 997


class _Remembering(nn.Module):
    """Has token ids for keys, in a single layer with a single head of size 1."""

    def __init__(self) -> None:
        super().__init__()
        logits = torch.randn(_ROWS, VOCABULARY, generator=torch.Generator().manual_seed(0))
        self.table = nn.Parameter(3 * logits, requires_grad=False)
        self.config = SimpleNamespace(get_text_config=lambda decoder: None)
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def get_output_embeddings(self) -> None:
        """It has none."""

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        use_cache: bool,
        longspan: Any,
        logits_to_keep: torch.Tensor | None = None,
    ) -> Any:
        """Logits ``[1, N, V]``."""
        batch, pattern = longspan.batch.device, longspan.attention.pattern
        size = batch.page_size
        keys = longspan.cache.layers[0].keys.view(-1)
        assert ((input_ids >= 0) & (input_ids < VOCABULARY)).all()
        keys[batch.slots] = input_ids[0].float()
        positions = position_ids[0]
        at = torch.arange(int(positions.max()) + 1)
        visible = (at <= positions[:, None]) & pattern.visible(positions[:, None], at)
        pages = batch.page_table[batch.owners[:, None], at // size]
        assert (pages[visible] > 0).all(), "an evicted page is still visible"
        found = keys[pages * size + at % size]
        assert not found[visible].isnan().any(), "unwritten memory is read"
        rows = [
            hash((position, *itertools.compress(tokens, seen))) % _ROWS
            for position, tokens, seen in zip(
                positions.tolist(), found.nan_to_num().int().tolist(), visible.tolist(), strict=True
            )
        ]
        if logits_to_keep is not None:
            rows = [rows[row] for row in logits_to_keep.tolist()]
        return SimpleNamespace(logits=self.table[torch.tensor(rows)][None])


def remembering() -> Any:
    """The model as ``tests.engine.harness.make_core`` needs it."""
    return SimpleNamespace(
        halves=None,
        model=_Remembering(),
        layers=[LayerSpec(0, 1, 1, 1, 1, 1.0)],
        rope=None,
        context_length=CONTEXT,
        dtype=torch.float32,
        unpacked="",
    )
