"""A batch that is advanced in place is the batch that would be built for the next step."""

import random

import pytest
import torch

from attention.batch import AttentionBatch
from attention.patterns.full import Full
from attention.patterns.sliding_window import SlidingWindow

PAGE_SIZES = [1, 4, 16]


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_advanced_equals_built(page_size):
    rng = random.Random(page_size)
    computed = [0, 3, 15, 16, 17, 63]
    prompt_lens = [n + rng.choice([0, 1, 5]) for n in computed]
    numbers = iter(range(1, 10_000))
    tables = [[next(numbers) for _ in range(n // page_size + 1)] for n in computed]

    def build():
        return AttentionBatch.build(computed, [1] * 6, tables, page_size, prompt_lens=prompt_lens)

    patterns = (Full(), None), (Full(), 24), (SlidingWindow(window=8, sinks=2), None)
    batch = build()
    for _ in range(12 * page_size):  # the tables outgrow what they had
        for rule in patterns:
            batch.visible.spans(*rule)  # as a step does
        computed = [n + 1 for n in computed]
        for n, table in zip(computed, tables, strict=True):
            if n // page_size == len(table):
                table.append(next(numbers))
        batch.advance(tables)
        expected = build()
        assert batch.host.seq_lens == expected.host.seq_lens
        for name in ("query_starts", "prompt_lens", "page_size", "decode_only"):
            assert getattr(batch.host, name) == getattr(expected.host, name)
        for name in ("owners", "positions", "row_prompt_lens"):
            assert (getattr(batch.host, name) == getattr(expected.host, name)).all()
        for name in ("owners", "positions", "slots"):
            assert torch.equal(getattr(batch.device, name), getattr(expected.device, name))
        table, wanted = batch.device.page_table, expected.device.page_table
        assert torch.equal(table[:, : wanted.shape[1]], wanted)
        assert not table[:, wanted.shape[1] :].any()
        for rule in patterns:
            assert (batch.visible.spans(*rule) == expected.visible.spans(*rule)).all()
