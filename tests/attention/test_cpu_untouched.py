"""The C++ kernel multiplies prompts with no tile that a window hides.

A value of NaN makes NaN of each sum that it is part of, also where its weight is 0. So the rows that are NaN
are those that were multiplied with it.
"""

import pytest
import torch

from attention import AttentionBatch, LayerSpec
from attention.kernels.cpu.paged import CpuPaged
from attention.patterns.full import Full
from attention.patterns.longformer import Longformer
from attention.patterns.segment import Segment
from attention.patterns.sliding_window import SlidingWindow
from tests.attention.cases import Case, attend, make_case

KERNELS = [CpuPaged(), CpuPaged(rounds_products=True)]
LAYER = LayerSpec(0, 9, 3, 64, 64, 0.125)
LENGTH = 1500
# Queries are multiplied in panels of up to 48, here 16 rows of 3 heads, with up to 8 tokens of a tile at
# a time, by a matrix unit with 32. In the first tile, of 64, these can be sinks, which all rows see, and
# others.
PANEL = 16


def reached(case: Case, kernel: CpuPaged, pattern, token: int, start: int) -> set[int]:
    """The positions, from ``start`` on, whose rows are multiplied with a token's values."""
    table = case.batch.device.page_table
    at = case.cache.values[table[0, token // 16], token % 16]
    kept = at.clone()
    at[:] = float("nan")
    batch = AttentionBatch.build([start], [LENGTH - start], table.tolist(), 16, prompt_lens=[LENGTH])
    rows = attend(kernel, case.layer, case.query[start:], case.cache, batch, pattern, None)
    at.copy_(kept)
    return {start + row for row in rows.isnan().flatten(1).any(dim=1).nonzero().flatten().tolist()}


@pytest.mark.parametrize("kernel", KERNELS, ids=["floats", "16 bits"])
@pytest.mark.parametrize("start", [0, 1100], ids=["a prompt", "a chunk"])
@pytest.mark.parametrize(
    "pattern",
    [
        SlidingWindow(window=100, sinks=4),
        Longformer(window=100, global_tokens=9),
        Segment(segment=60, sinks=4),
    ],
    ids=lambda pattern: pattern.name,
)
def test_rows_are_multiplied_with_what_they_see(pattern, start, kernel):
    case = make_case(LAYER, [(LENGTH, LENGTH)], 16, dtype=torch.float16)
    case.query = case.query.float()
    positions = torch.arange(LENGTH)

    def seeing(token: int) -> set[int]:
        seen = (positions >= token) & pattern.visible(positions, torch.tensor(token))
        return {position for position in positions[seen].tolist() if position >= start}

    for token in (2, 70, 777, 1050, 1099, 1250, LENGTH - 1):
        found = reached(case, kernel, pattern, token, start)
        assert seeing(token) <= found
        # A row of the same panel sees the token, or one that is multiplied together with it.
        step = 32 if kernel.products(torch.float16) == "bfloat16" else 8
        together = [*range(token - step + 1, min(token + step, LENGTH))]
        rows = set().union(*map(seeing, together))
        assert found <= {at for row in rows for at in range(row - PANEL + 1, row + PANEL)}


def test_the_method_finds_what_is_multiplied():
    case = make_case(LAYER, [(LENGTH, LENGTH)], 16, dtype=torch.float16)
    assert reached(case, KERNELS[0], Full(), 777, 0) >= set(range(777, LENGTH))
