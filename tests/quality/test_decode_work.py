"""Costs of a decode step by the length of its context, as counts: times on a busy machine prove nothing."""

from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attention.backends import resolve
from attention.batch import AttentionBatch
from attention.cache import PagedCache
from attention.types import LayerSpec
from loadtest.deployment import FULL, window

PAGE = 16
LAYER = LayerSpec(index=0, query_heads=4, kv_heads=2, head_size=8, value_size=8, scale=0.35)
CONTEXTS = (1024, 2048, 4096, 8192)


class Elements(TorchDispatchMode):
    """Counts the elements of all tensors that operators make; views are free, and so are inputs."""

    def __init__(self):
        super().__init__()
        self.made = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if torch.Tag.inplace_view not in function.tags and not function.is_view:
            outputs = output if isinstance(output, (tuple, list)) else (output,)
            self.made += sum(made.numel() for made in outputs if isinstance(made, torch.Tensor))
        return output


def work(deployment, context):
    """Elements made, and tokens in pages that the step could read at all, in one decode step of one layer."""
    attention = resolve(deployment.attention, deployment.options, "sdpa", [LAYER], "cpu", torch.float32, PAGE)
    pages = list(range(1, context // PAGE + 1))
    for gone in attention.expired(context - 1, PAGE):
        pages[gone] = 0
    cache = PagedCache([LAYER], len(pages) + 1, PAGE, torch.float32, poison=True).layers[0]
    for page in filter(None, pages):
        cache.keys[page] = cache.values[page] = 1.0
    batch = AttentionBatch.build([context - 1], [1], [pages], PAGE)
    query = torch.ones(1, LAYER.query_heads, LAYER.head_size)
    with Elements() as elements:
        output = attention.forward(LAYER, query, cache, attention.plans(batch))
    assert torch.equal(output, torch.ones_like(output))
    return elements.made, PAGE * int((batch.device.page_table != 0).sum())


def test_a_window_makes_every_step_cost_the_same():
    steps = [work(window(508, 4), context) for context in CONTEXTS]
    assert len(set(steps)) == 1
    assert steps[0][1] <= 508 + 4 + 2 * PAGE


def test_full_attention_costs_more_with_every_token():
    steps = [work(FULL, context) for context in CONTEXTS]
    assert [tokens for _, tokens in steps] == list(CONTEXTS)
    for (fewer, _), (more, _) in pairwise(steps):
        assert more == pytest.approx(2 * fewer, rel=0.05)


def test_a_window_costs_what_it_holds():
    wide, narrow = (work(window(size, 4), 4096)[0] for size in (1020, 508))
    assert wide == pytest.approx(2 * narrow, rel=0.05)
