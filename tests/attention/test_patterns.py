"""Each pattern against its own rule, token by token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention.backends import UnsupportedError, resolve
from attention.patterns.base import Pattern
from attention.patterns.full import Full
from attention.patterns.sliding_window import SlidingWindow
from attention.types import LayerSpec
from tests.attention.cases import patterns

LAYERS = [LayerSpec(0, 4, 2, 16, 16, 0.25)]


@given(patterns, st.integers(0, 120), st.integers(1, 20))
def test_a_page_expires_exactly_when_no_later_query_sees_any_of_it(pattern: Pattern, seq_len, page_size):
    later = torch.arange(seq_len, seq_len + 300)[:, None]
    seen = pattern.visible(later, torch.arange(seq_len)).any(dim=0)
    full_pages = seq_len // page_size
    alive = [bool(seen[i * page_size : (i + 1) * page_size].any()) for i in range(full_pages)]
    gone = pattern.expired(seq_len, page_size)
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


def test_options_come_back_with_their_defaults():
    attention = resolve("sliding_window", {"window": "64"}, "auto", LAYERS, "cpu", torch.float32, 16)
    assert attention.options == {"window": "64", "sinks": "4"}
    assert SlidingWindow.from_options(attention.options).options == attention.options
    assert Full.from_options({}).options == {}


@pytest.mark.parametrize(
    "options", [{"window": "0"}, {"window": "-3"}, {"window": "many"}, {"sinks": "1.5"}, {"size": "4"}]
)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(UnsupportedError, match="sliding_window"):
        resolve("sliding_window", options, "auto", LAYERS, "cpu", torch.float32, 16)
