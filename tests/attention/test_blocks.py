from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import LayerSpec
from attention.patterns import blocks
from attention.patterns.full import Full
from tests.attention.cases import known, make_case, sequences

LAYER = LayerSpec(0, 1, 1, 1, 1, 1.0)


@settings(max_examples=30, deadline=None)
@given(sequences(300, 8), st.data(), st.sampled_from([1, 2000, 64 << 20]))
def test_every_row_is_in_one_block_with_its_pages(shapes, data, limit):
    case = make_case(LAYER, shapes, 4)
    total = case.batch.host.query_starts[-1]
    rows = torch.tensor(sorted(data.draw(st.sets(st.integers(0, total - 1)))), dtype=torch.long)
    selecting = known(case.batch, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "_BYTES", limit)
        found = selecting.blocks(3, 5)
    indices = [index for block in found for index in block.rows.flatten().tolist()]
    assert sorted(indices) == list(range(len(rows)))
    for block in found:
        assert torch.equal(block.positions, case.batch.device.positions[rows[block.rows]])
        width = block.pages.shape[1]
        count = block.rows.shape[1]
        for s, row in enumerate(rows[block.rows[:, 0]].tolist()):
            b = int(case.batch.device.owners[row])
            assert (case.batch.device.owners[rows[block.rows[s]]] == b).all()
            own = -(-case.batch.host.seq_lens[b] // 4)
            assert width >= own
            assert width <= max(2 * own, 32)
            assert block.pages[s, :own].tolist() == case.batch.device.page_table[b, :own].tolist()
            assert (block.pages[s, own:] == 0).all()
        if len(block.rows) > 1:
            assert len(block.rows) * width * (3 + 5) <= limit
        if count > 1:
            assert count * width * 5 <= limit


def test_layers_share_the_blocks_of_the_same_rows():
    case = make_case(LAYER, [(9, 1), (5, 5)], 4, pattern=Full())
    rows, others = known(case.batch, range(3)), known(case.batch, range(3))
    assert rows.blocks(1, 1) is rows.blocks(1, 1)
    assert rows.blocks(1, 1) is not rows.blocks(1, 2)
    assert others.blocks(1, 1) is not rows.blocks(1, 1)
