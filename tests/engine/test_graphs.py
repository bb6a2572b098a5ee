"""Which steps are captured; ``graphs_interpreted.py`` beside this file captures some."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.models.executors.captured import CapturedExecutor, CaptureError, batch_sizes
from tests.engine.harness import load, make_core
from tests.models_zoo import save_tiny


def test_a_kernel_that_plans_on_the_host_is_not_captured(tmp_path):
    eager = make_core(load(save_tiny("llama", tmp_path))).runner.executor
    with pytest.raises(CaptureError, match="kernel cpu_paged plans every step on the host"):
        CapturedExecutor(eager, lambda: None, most=4, context_length=64)


@given(st.integers(1, 5000))
def test_a_batch_is_filled_up_by_at_most_a_half(most):
    sizes = batch_sizes(most)
    assert sizes == tuple(sorted(set(sizes)))
    assert (sizes[0], sizes[-1]) == (1, most)
    for count in range(1, most + 1):
        assert next(size for size in sizes if size >= count) <= max(count, count * 3 // 2 - 1)
