from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import LayerSpec, PagedCache, resolve
from attention.patterns.oracle import Oracle
from attention.patterns.sparse import from_options
from attention.patterns.topk import TopK
from tests.attention.cases import budgeted, layers, make_case, rows_selected, sequences

oracles = budgeted(Oracle)
page_sizes = st.integers(1, 9)
seeds = st.integers(0, 1 << 30)


def weights_by_hand(layer, query, i, keys, head):
    """The attention weights of one head of the query at ``i``, by position, in plain Python."""
    kv = head // (layer.query_heads // layer.kv_heads)
    first = 0 if layer.window is None else max(0, i - layer.window + 1)
    logits = {}
    for j in range(first, i + 1):
        logit = layer.scale * sum(
            q * k for q, k in zip(query[head].tolist(), keys[j, kv].tolist(), strict=True)
        )
        logits[j] = logit if layer.softcap is None else layer.softcap * math.tanh(logit / layer.softcap)
    largest = max(logits.values())
    total = sum(math.exp(logit - largest) for logit in logits.values())
    return {j: math.exp(logit - largest) / total for j, logit in logits.items()}


def seen_by_hand(pattern, layer, query, i, keys, page_size):
    """The positions that one query at ``i`` sees in its layer's window: a set per KV head."""
    own, group = i // page_size, layer.query_heads // layer.kv_heads
    pages = max(math.ceil(pattern.budget / page_size), 3)
    count = max(0, pages - pattern.sink_pages - pattern.recent_pages) * page_size
    result = []
    for kv in range(layer.kv_heads):
        heads = [weights_by_hand(layer, query, i, keys, kv * group + g) for g in range(group)]
        always = {
            j
            for j in heads[0]
            if j // page_size < pattern.sink_pages or j // page_size > own - pattern.recent_pages
        }
        sums = {
            j: torch.tensor(math.log(sum(head[j] for head in heads)), dtype=torch.float64).float().item()
            for j in heads[0]
            if j not in always
        }
        result.append(always | set(sorted(sums, key=lambda j: (-sums[j], j))[:count]))
    return result


@settings(max_examples=12, deadline=None)
@given(layers(features=True), st.integers(1, 40), page_sizes, oracles, seeds, st.booleans())
def test_selection_is_the_rule(layer, length, page_size, pattern, seed, tied):
    case = make_case(layer, [(length, length)], page_size, pattern=pattern, seed=seed)
    (keys,) = case.keys
    if tied:  # whole numbers, so that many keys score the same
        for tensor in (case.query, keys):
            tensor.copy_(tensor.clamp(-1, 1).round())
    defined = pattern.selection(layer, case.query, case.batch.device.positions, keys, page_size)
    for i in range(length):
        near = range(length) if layer.window is None else range(max(0, i - layer.window + 1), length)
        expected = seen_by_hand(pattern, layer, case.query[i], i, keys, page_size)
        assert [set(row.nonzero().flatten().tolist()) & set(near) for row in defined[i]] == expected


@settings(max_examples=15, deadline=None)
@given(
    layers(features=True),
    sequences(120, 5),
    page_sizes,
    oracles,
    seeds,
    st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn]),
    st.sampled_from([1, 1 << 14, 64 << 20]),
)
def test_select_equals_selection(layer, shapes, page_size, pattern, seed, dtype, block_bytes):
    lens = [length // 2 for length, _ in shapes]
    case = make_case(layer, shapes, page_size, pattern=pattern, seed=seed, dtype=dtype, prompt_lens=lens)
    assert rows_selected(case, pattern, block_bytes) == len(case.batch.visible.selecting(pattern))


@settings(max_examples=12, deadline=None)
@given(layers(), st.integers(1, 120), page_sizes, oracles, seeds)
def test_it_sees_as_many_tokens_as_topk_and_gives_them_no_less_attention(
    layer, length, page_size, oracle, seed
):
    topk = TopK(oracle.budget, oracle.sink_pages, oracle.recent_pages, "sparse")
    case = make_case(layer, [(length, 1)], page_size, pattern=oracle, seed=seed)
    (keys,), i = case.keys, length - 1
    ours, theirs = (
        pattern.selection(layer, case.query, case.batch.device.positions, keys, page_size)[0]
        for pattern in (oracle, topk)
    )
    at = torch.arange(length)
    if layer.window is None:
        assert torch.equal(ours.sum(-1), theirs.sum(-1))
    always = (at // page_size < oracle.sink_pages) | (at // page_size > i // page_size - oracle.recent_pages)
    assert ours[:, always].all()
    assert theirs[:, always].all()
    group = layer.query_heads // layer.kv_heads
    for kv in range(layer.kv_heads):
        heads = [weights_by_hand(layer, case.query[0], i, keys, kv * group + g) for g in range(group)]
        mine, others = (
            sum(head[j] for head in heads for j in head if seen[kv, j]) for seen in (ours, theirs)
        )
        assert mine >= others - 1e-6


def test_it_keeps_no_summaries():
    specs = [LayerSpec(i, 4, 2, 64, 64, 0.125) for i in range(4)]
    bare = PagedCache.bytes_per_page(specs, 16, torch.bfloat16)
    assert PagedCache.bytes_per_page(specs, 16, torch.bfloat16, Oracle(512, 1, 4)) == bare


def test_options():
    pattern = from_options({"pattern": "oracle", "budget": "64"})
    assert pattern.options == from_options({"pattern": "topk", "budget": "64"}).options
    assert pattern.decoded_keys_differ
    specs = [LayerSpec(i, 4, 2, 64, 64, 0.125) for i in range(3)]
    given = {"pattern": "oracle", "budget": "100", "prefill": "sparse", "dense_layers": ""}
    attention = resolve("sparse", given, "auto", specs, "cpu", torch.float32, 16)
    assert attention.options == {**given, "sink_pages": "1", "recent_pages": "4"}
    assert attention.kernel.name == "cpu_paged"
    with pytest.raises(ValueError, match="oracle's budget is '0'; it must be a whole number of at least 1"):
        from_options({"pattern": "oracle", "budget": "0"})
