"""Each pattern against its own rule, token by token."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.backends import Attention, UnsupportedError, resolve
from attention.kernels.base import visibility
from attention.kernels.reference import Reference
from attention.patterns.base import Pattern
from attention.patterns.bigbird import BigBird
from attention.patterns.full import Full
from attention.patterns.lsh import Lsh
from attention.patterns.oracle import Oracle
from attention.patterns.segment import Segment
from attention.patterns.sliding_window import SlidingWindow
from attention.patterns.table import pages_selected_at, selects_at, spans_at
from attention.patterns.topk import TopK
from attention.types import LayerSpec
from tests.attention.cases import patterns

LAYERS = [LayerSpec(0, 4, 2, 16, 16, 0.25)]


@given(patterns, st.integers(0, 120), st.integers(1, 20))
def test_a_page_expires_when_no_later_query_sees_any_of_it(pattern: Pattern, seq_len, page_size):
    later = torch.arange(seq_len, seq_len + 300)[:, None]
    seen = pattern.visible(later, torch.arange(seq_len)).any(dim=0)
    full_pages = seq_len // page_size
    alive = [bool(seen[i * page_size : (i + 1) * page_size].any()) for i in range(full_pages)]
    gone = pattern.expired(seq_len, page_size)
    assert not any(alive[i] for i in gone)
    if not isinstance(pattern, BigBird):  # whose later draws are unknown
        assert [i in gone for i in range(full_pages)] == [not a for a in alive]
    assert not gone or gone.stop <= full_pages


@given(patterns, st.integers(0, 60))
def test_a_query_sees_itself_and_nothing_later(pattern: Pattern, position):
    keys = torch.arange(80)
    visible = pattern.visible(torch.tensor(position), keys)
    assert visible[position]
    assert not visible[position + 1 :].any()


@given(st.integers(1, 30), st.integers(0, 8), st.integers(0, 60))
def test_sliding_window_is_sinks_and_recent_tokens(window, sinks, position):
    visible = SlidingWindow(window, sinks).visible(torch.tensor(position), torch.arange(61))
    recent = set(range(max(0, position - window + 1), position + 1))
    assert set(visible.nonzero().flatten().tolist()) == recent | set(range(min(sinks, position + 1)))


@given(st.integers(1, 20), st.integers(0, 8), st.integers(0, 60))
def test_segment_is_sinks_and_two_segments(segment, sinks, position):
    visible = Segment(segment, sinks).visible(torch.tensor(position), torch.arange(61))
    previous = max(0, position // segment - 1) * segment
    expected = set(range(previous, position + 1)) | set(range(min(sinks, position + 1)))
    assert set(visible.nonzero().flatten().tolist()) == expected


@given(st.integers(1, 8), st.integers(1, 3), st.integers(0, 4), st.integers(0, 1 << 40), st.integers(0, 200))
def test_bigbird_is_window_first_block_and_few_random_blocks(block, window, random, seed, position):
    pattern = BigBird(block, window, random, seed)
    visible = pattern.visible(torch.tensor(position), torch.arange(201))
    blocks = {key // block for key in visible.nonzero().flatten().tolist()}
    own = position // block
    regular = {0, *range(max(0, own - window + 1), own + 1)}
    assert regular <= blocks
    assert len(blocks - regular) <= random
    assert set(visible.nonzero().flatten().tolist()) == {
        key for key in range(position + 1) if key // block in blocks
    }
    first = torch.tensor(own * block)
    assert torch.equal(
        pattern.visible(first, torch.arange(own * block)),
        pattern.visible(torch.tensor(position), torch.arange(own * block)),
    ), "queries of one block differ"


def test_bigbird_draws_all_earlier_blocks_about_equally():
    drawn = torch.stack([BigBird(1, 1, 1, seed)._drawn(torch.tensor(10), 0) for seed in range(4000)])
    counts = torch.bincount(drawn, minlength=10)
    assert len(counts) == 10
    assert counts.min() > 300
    assert counts.max() < 500
    neighbors = BigBird(1, 1, 1, 5)._drawn(torch.arange(1000, 5000), 0).float() / torch.arange(1000, 5000)
    assert abs(float(neighbors.mean()) - 0.5) < 0.02


@pytest.mark.parametrize(
    ("backend", "given", "in_force"),
    [
        ("full", {}, {}),
        (
            "sliding_window",
            {"window": "64"},
            {"window": "64", "sinks": "4", "positions": "original", "dense_layers": ""},
        ),
        (
            "sparse",
            {"pattern": "longformer"},
            {"pattern": "longformer", "window": "512", "global_tokens": "16", "dense_layers": ""},
        ),
        (
            "sparse",
            {"pattern": "segment", "sinks": "0"},
            {"pattern": "segment", "segment": "512", "sinks": "0", "dense_layers": ""},
        ),
        (
            "sparse",
            {"pattern": "bigbird", "seed": "3"},
            {
                "pattern": "bigbird",
                "block": "64",
                "window_blocks": "3",
                "random_blocks": "3",
                "seed": "3",
                "dense_layers": "",
            },
        ),
    ],
)
def test_options_come_back_with_their_defaults(backend, given, in_force):
    attention = resolve(backend, given, "auto", LAYERS, "cpu", torch.float32, 16)
    assert attention.options == in_force
    assert resolve(backend, in_force, "auto", LAYERS, "cpu", torch.float32, 16).options == in_force


@pytest.mark.parametrize(
    ("backend", "options", "sentence"),
    [
        ("sliding_window", {"window": "0"}, "window is '0'; it must be a whole number of at least 1"),
        ("sliding_window", {"window": "-3"}, "window is '-3'"),
        ("sliding_window", {"sinks": "1.5"}, "sinks is '1.5'"),
        ("sliding_window", {"size": "4"}, "has no option 'size'; its options are window, sinks"),
        ("sliding_window", {"dense_layers": "0,x"}, "dense_layers is '0,x'; give indices of layers"),
        ("sliding_window", {"dense_layers": "0, 1"}, "names layer 1, but the model's layers are 0 to 0"),
        ("sparse", {}, "choose pattern=longformer or pattern=bigbird or pattern=segment"),
        ("sparse", {"pattern": "psychic"}, "has no pattern 'psychic'"),
        ("sparse", {"pattern": "segment", "window": "4"}, "segment has no option 'window'"),
    ],
)
def test_options_that_make_no_sense_are_refused(backend, options, sentence):
    with pytest.raises(UnsupportedError) as error:
        resolve(backend, options, "auto", LAYERS, "cpu", torch.float32, 16)
    assert sentence in str(error.value)


@given(patterns, st.lists(st.integers(0, 150), min_size=1, max_size=8))
def test_spans_are_the_rule(pattern: Pattern, positions):
    at = torch.tensor(positions)
    keys = torch.arange(160)
    expected = pattern.visible(at[:, None], keys)
    spans = pattern.spans(at)
    covered = (keys >= spans[..., :1]) & (keys < spans[..., 1:])
    assert torch.equal(covered.sum(dim=1), expected.long()), "ranges overlap, or are not the rule"
    for begin, end in (row[row[:, 0] < row[:, 1]].T for row in spans):
        assert (begin[1:] >= end[:-1]).all(), "ranges are not in order"


@given(patterns, st.lists(st.integers(0, 1200), max_size=20))
def test_cached_ranges_are_the_patterns(pattern: Pattern, positions):
    """Of few positions and many, near each other and apart."""
    found = spans_at(pattern, np.array(positions, dtype=np.int64))
    expected = pattern.spans(torch.tensor(positions, dtype=torch.long)).numpy()
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected)


class Uneven(Full):
    """One more range, an empty one, from position 256 on."""

    def spans(self, positions):
        spans = super().spans(positions)
        return (
            spans if len(positions) and positions[0] < 256 else torch.nn.functional.pad(spans, (0, 0, 1, 0))
        )


def test_patterns_may_give_more_ranges_for_some_positions():
    """Cached ranges of different widths don't fit one array: then the pattern computes all of them."""
    positions = np.array([3, 700])
    assert spans_at(Uneven(), positions).tolist() == [[[0, 4]], [[0, 701]]]
    assert spans_at(Uneven(), positions[1:]).tolist() == [[[0, 0], [0, 701]]]


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([TopK(48, 1, 2), TopK(48, 1, 2, "sparse"), Oracle(48, 1, 2), Lsh.from_options({})]),
    st.lists(st.tuples(st.integers(0, 900), st.integers(1, 900)), max_size=20),
    st.integers(1, 20),
)
def test_cached_selections_are_the_patterns(pattern, rows, page_size):
    positions, prompt_lens = np.array(rows, dtype=np.int64).reshape(-1, 2).T.copy()
    asked = torch.from_numpy(positions), torch.from_numpy(prompt_lens)
    for found, expected in (
        (selects_at(pattern, positions, prompt_lens), pattern.selects(*asked)),
        (
            pages_selected_at(pattern, positions, prompt_lens, page_size),
            pattern.pages_selected(*asked, page_size),
        ),
    ):
        assert found.dtype == expected.numpy().dtype
        assert np.array_equal(found, expected.numpy())


@given(
    patterns,
    st.lists(st.none() | st.integers(1, 60), min_size=1, max_size=3),
    st.integers(0, 120),
    st.integers(1, 9),
)
def test_a_page_expires_only_when_no_layer_sees_it(pattern: Pattern, windows, seq_len, page_size):
    layers = [LayerSpec(i, 4, 2, 16, 16, 0.25, window=window) for i, window in enumerate(windows)]
    attention = Attention("any", pattern, Reference(), "", tuple(layers))
    later, keys = torch.arange(seq_len, seq_len + 300)[:, None], torch.arange(seq_len)
    seen = torch.stack([visibility(later, keys, layer.window, pattern) for layer in layers]).any(dim=(0, 1))
    gone = attention.expired(seq_len, page_size)
    assert not any(bool(seen[i * page_size : (i + 1) * page_size].any()) for i in gone)
    if None in windows:
        assert len(gone) <= len(pattern.expired(seq_len, page_size))
    elif pattern.name == "full":
        assert len(gone) == max(0, seq_len - max(windows) + 1) // page_size


def test_dense_layers_keep_every_page():
    window = SlidingWindow(4, 1, dense_layers=(1,))
    layers = tuple(LayerSpec(i, 4, 2, 16, 16, 0.25) for i in range(3))
    attention = Attention("any", window, Reference(), "", layers)
    assert attention.expired(100, 4) == range(0)
    assert [attention.pattern_of(layer).name for layer in layers] == [
        "sliding_window",
        "full",
        "sliding_window",
    ]
