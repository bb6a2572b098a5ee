import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.backends import Attention
from attention.kernels.base import visibility
from attention.kernels.reference import Reference
from attention.patterns.base import Pattern
from attention.patterns.full import Full
from attention.patterns.sliding_window import SlidingWindow
from attention.patterns.topk import TopK
from attention.reading import LayerReads, pages_of
from attention.types import LayerSpec
from tests.attention.cases import make_case, patterns, sequences, with_prompts


def attention(pattern: Pattern, *windows: int | None) -> Attention:
    layers = tuple(LayerSpec(i, 1, 1, 1, 1, 1.0, window=window) for i, window in enumerate(windows))
    return Attention("any", pattern, Reference(), "", layers)


@settings(max_examples=30, deadline=None)
@given(
    patterns,
    st.lists(st.none() | st.integers(1, 60), min_size=1, max_size=3),
    sequences(120, 4),
    st.integers(1, 20),
)
def test_a_page_is_read_if_some_query_sees_a_key_on_it(pattern, windows, shapes, page_size):
    resolved = attention(pattern, *windows)
    batch = make_case(resolved.layers[0], shapes, page_size).batch
    read = total = pairs = 0
    for length, queries in shapes:
        at, keys = torch.arange(length - queries, length)[:, None], torch.arange(length)
        for layer in resolved.layers:
            visible = visibility(at, keys, layer.window, pattern)
            pages = [bool(part.any()) for part in visible.any(dim=0).split(page_size)]
            pairs += int(visible.sum())
            read += sum(pages)
            total += len(pages)
    found = pages_of(resolved, batch.visible)
    assert found[:2] == (read, total - read)
    assert sum(len(reads.layers) * reads.pages for reads in found.by_layer) == read
    assert sum(len(reads.layers) * reads.pairs for reads in found.by_layer) == pairs
    assert sorted(i for reads in found.by_layer for i in reads.layers) == list(range(len(windows)))


def test_topk_reads_its_selection_from_the_prompts_end_on():
    batch = make_case(LayerSpec(0, 1, 1, 1, 1, 1.0), [(1000, 1), (1000, 1), (20, 1)], 10).batch
    batch = with_prompts(batch, [999, 1000, 19])
    pattern = TopK(budget=200, sink_pages=1, recent_pages=4)
    # The second sequence's row is its prompt's last; the third has fewer tokens than may be selected.
    assert pages_of(attention(pattern, None), batch.visible).by_layer == (
        LayerReads((0,), 122, 200 + 1000 + 20, summaries=100 + 2),
    )
    assert pages_of(attention(pattern, None), batch.visible)[:2] == (20 + 100 + 2, 80)
    assert pages_of(attention(TopK(200, 1, 4, prefill="sparse"), None), batch.visible)[:2] == (
        20 + 20 + 2,
        160,
    )


def test_full_attention_skips_no_page_and_a_window_those_behind_it():
    batch = make_case(LayerSpec(0, 1, 1, 1, 1, 1.0), [(1000, 1), (100, 1)], 10).batch
    assert pages_of(attention(Full(), None, None), batch.visible)[:2] == (220, 0)
    window = SlidingWindow(20, 1)
    assert pages_of(attention(window, None), batch.visible)[:2] == (3 + 3, 110 - 6)
    exempt = SlidingWindow(20, 1, dense_layers=(0,))
    assert pages_of(attention(exempt, None, None), batch.visible)[:2] == (110 + 6, 110 - 6)
