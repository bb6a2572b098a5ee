"""A prompt's rows by the C++ kernel are the same to the last bit for any cut of the prompt into steps."""

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import AttentionBatch, LayerCache, LayerSpec
from attention.dtypes import CACHE_DTYPES
from attention.kernels.cpu.paged import CpuPaged
from attention.patterns.bigbird import BigBird
from attention.patterns.full import Full
from attention.patterns.longformer import Longformer
from attention.patterns.segment import Segment
from attention.patterns.sliding_window import SlidingWindow
from attention.patterns.topk import TopK
from tests.attention.cases import Case, attend, layers, make_case, patterns

DTYPES = list(CACHE_DTYPES.values())
KERNELS = [CpuPaged(), CpuPaged(rounds_products=True)]


def chunk(
    case: Case, pattern, start: int, stop: int, prompt_len: int, kernel: CpuPaged = KERNELS[0]
) -> torch.Tensor:
    """The rows from ``start`` to ``stop`` of one sequence in a separate step.

    Expired pages are evicted, and later tokens are not yet written.
    """
    whole, page_size = case.batch.device, case.batch.host.page_size
    table, cache = whole.page_table.clone(), LayerCache(*(part.clone() for part in case.cache[:2]))
    table[0, list(pattern.expired(start, page_size))] = 0
    for part in cache[:2]:
        part.view(-1, *part.shape[2:])[whole.slots[stop:]] = float("nan")
    pages = table.tolist()
    batch = AttentionBatch.build([start], [stop - start], pages, page_size, prompt_lens=[prompt_len])
    return attend(kernel, case.layer, case.query[start:stop], cache, batch, pattern, case.sinks)


def check(case: Case, pattern, cuts: list[int], kernel: CpuPaged = KERNELS[0]) -> None:
    length = len(case.query)
    whole = attend(kernel, case.layer, case.query, case.cache, case.batch, pattern, case.sinks)
    for start, stop in itertools.pairwise([0, *cuts, length]):
        assert torch.equal(chunk(case, pattern, start, stop, length, kernel), whole[start:stop])


@settings(max_examples=12, deadline=None)
@given(
    layers(features=True),
    st.integers(2, 300),
    st.integers(1, 32),
    patterns,
    st.integers(0, 1 << 30),
    st.sampled_from(DTYPES),
    st.sampled_from(KERNELS),
    st.data(),
)
def test_cuts_anywhere(layer, length, page_size, pattern, seed, dtype, kernel, data):
    case = make_case(layer, [(length, length)], page_size, pattern=pattern, dtype=dtype, seed=seed)
    cuts = data.draw(st.sets(st.integers(1, length - 1) | st.just(length - 1), max_size=9), label="cuts")
    check(case, pattern, sorted(cuts), kernel)


@pytest.mark.parametrize("kernel", KERNELS, ids=["floats", "16 bits"])
@pytest.mark.parametrize(
    "pattern",
    [
        Full(),
        SlidingWindow(window=300, sinks=4),
        SlidingWindow(window=1020, sinks=4),
        SlidingWindow(window=4150, sinks=70),
        Longformer(window=200, global_tokens=10),
        BigBird(block=64, window_blocks=3, random_blocks=3, seed=0),
        BigBird(block=24, window_blocks=3, random_blocks=5, seed=0),
        Segment(segment=200, sinks=4),
    ],
    ids=lambda pattern: "-".join([pattern.name, *pattern.options.values()]),
)
def test_prompts_of_many_blocks_and_parts(pattern, kernel):
    """Chunks of several blocks, of one, and single rows, where rows are in one part and where in several."""
    rng = random.Random(0)
    length = 4300
    for window, dtype in ((None, torch.float16), (4200, torch.float16)):
        layer = LayerSpec(0, 6, 2, 24, 40, 0.2, window=window, softcap=None if window else 5.0, sinks=True)
        case = make_case(layer, [(length, length)], 16, pattern=pattern, dtype=dtype)
        for cuts in ([16, 17, 4096, 4097, length - 1], rng.sample(range(1, length), 12)):
            check(case, pattern, sorted(cuts), kernel)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_prompts_that_select(kv_heads):
    """With one KV head, rows that select form blocks too."""
    pattern = TopK(budget=64, sink_pages=1, recent_pages=2, prefill="sparse", dense_layers=())
    layer, length = LayerSpec(0, 4, kv_heads, 24, 24, 0.2), 400
    case = make_case(layer, [(length, length)], 16, pattern=pattern)
    whole = attend(CpuPaged(), layer, case.query, case.cache, case.batch, pattern, None)
    pages = [case.batch.device.page_table[0].tolist()]
    for start, stop in itertools.pairwise([*range(0, length, 57), length]):
        batch = AttentionBatch.build([start], [stop - start], pages, 16, prompt_lens=[length])
        rows = attend(CpuPaged(), layer, case.query[start:stop], case.cache, batch, pattern, None)
        assert torch.equal(rows, whole[start:stop])


def test_a_group_of_more_queries_than_a_block_takes():
    case = make_case(LayerSpec(0, 300, 1, 8, 8, 0.3), [(40, 40)], 16)
    check(case, Full(), [16, 39])


def test_rows_after_the_prompt_are_summed_otherwise():
    """As decode rows are, which is faster for them."""
    case = make_case(LayerSpec(0, 6, 2, 64, 64, 0.125), [(400, 400)], 16)
    whole = attend(CpuPaged(), case.layer, case.query, case.cache, case.batch, Full(), None)
    decoded = chunk(case, Full(), 399, 400, prompt_len=399)
    assert not torch.equal(decoded, whole[399:])
    torch.testing.assert_close(decoded, whole[399:], rtol=1e-5, atol=1e-5)
