from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import AttentionBatch, LayerSpec, PagedCache, resolve
from attention.kernels.reference import Reference
from attention.patterns.full import Full
from attention.patterns.lsh import Lsh
from attention.patterns.sparse import from_options
from tests.attention.cases import attend, by_definition, layers, make_case, rows_selected, sequences, update

lshs = st.builds(
    Lsh,
    st.integers(1, 3),
    st.integers(1, 20).map(lambda half: 2 * half) | st.just(300),
    st.integers(1, 20),
    st.integers(0, 5),
    st.integers(0, 99),
)
page_sizes = st.integers(1, 9)
seeds = st.integers(0, 1 << 30)


def directions_by_hand(pattern, layer):
    """For each round, the directions as lists of numbers."""
    stream = np.random.RandomState(
        np.random.MT19937(np.random.SeedSequence((pattern.seed, layer.index, layer.head_size)))
    )
    rounds = stream.standard_normal((pattern.hashes, layer.head_size, pattern.buckets // 2))
    return [columns.T.tolist() for columns in rounds.astype(np.float32)]


def buckets_by_hand(directions, vector):
    buckets = []
    for columns in directions:
        products = [sum(r * x for r, x in zip(column, vector, strict=True)) for column in columns]
        products = torch.tensor(products, dtype=torch.float64).float().tolist()
        signed = products + [-product for product in products]
        buckets.append(signed.index(max(signed)))
    return buckets


@settings(max_examples=20, deadline=None)
@given(layers(), st.integers(1, 25), lshs, seeds)
def test_selection_is_the_rule(layer, length, pattern, seed):
    case = make_case(layer, [(length, length)], 4, pattern=pattern, seed=seed)
    (keys,) = case.keys
    keys[0] = 0  # every direction is as good
    defined = pattern.selection(layer, case.query, case.batch.device.positions, keys, 4)
    directions = directions_by_hand(pattern, layer)
    group = layer.query_heads // layer.kv_heads
    for kv in range(layer.kv_heads):
        of_keys = [buckets_by_hand(directions, key) for key in keys[:, kv].tolist()]
        for i in range(length):
            heads = case.query[i, kv * group : (kv + 1) * group].tolist()
            of_query = [buckets_by_hand(directions, head) for head in heads]
            expected = {
                j
                for j in range(i + 1)
                if j < pattern.sinks
                or i - j < pattern.window
                or any(a == b for mine in of_query for a, b in zip(mine, of_keys[j], strict=True))
            }
            assert set(defined[i, kv].nonzero().flatten().tolist()) == expected


@settings(max_examples=12, deadline=None)
@given(
    layers(),
    sequences(120, 5),
    page_sizes,
    lshs,
    seeds,
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([1, 1 << 14, 64 << 20]),
)
def test_select_equals_selection(layer, shapes, page_size, pattern, seed, dtype, block_bytes):
    case = make_case(layer, shapes, page_size, pattern=pattern, seed=seed, dtype=dtype)
    assert rows_selected(case, pattern, block_bytes) == len(case.query)


@settings(max_examples=20, deadline=None)
@given(layers(features=True), sequences(20, 3), page_sizes, lshs, seeds)
def test_reference_follows_the_definition(layer, shapes, page_size, pattern, seed):
    case = make_case(layer, shapes, page_size, pattern=pattern, seed=seed)
    result = attend(Reference(), layer, case.query, case.cache, case.batch, pattern, case.sinks)
    torch.testing.assert_close(result.double(), by_definition(case, pattern), rtol=1e-5, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(layers(), sequences(60, 3), page_sizes, lshs, seeds)
def test_a_window_that_covers_the_context_is_full_attention(layer, shapes, page_size, pattern, seed):
    pattern.window = max(length for length, _ in shapes)
    case = make_case(layer, shapes, page_size, pattern=pattern, seed=seed)
    full = attend(Reference(), layer, case.query, case.cache, case.batch, Full(), None)
    assert torch.equal(attend(Reference(), layer, case.query, case.cache, case.batch, pattern, None), full)


def test_like_vectors_share_buckets():
    """The smaller the angle, the more often; length does not matter."""
    layer = LayerSpec(0, 1, 1, 64, 64, 0.125)
    pattern = Lsh(hashes=200, buckets=32, window=1, sinks=0)
    random = torch.Generator().manual_seed(0)
    vector, other = torch.randn(2, 64, generator=random)
    near = [vector + noise * other for noise in (0.1, 0.5, 2.0)]
    of_query, *of_keys = pattern._hash(layer, torch.stack([vector, *near, 7 * vector, -vector]))
    shared = [int((of_query == of_key).sum()) for of_key in of_keys]
    assert shared[0] > shared[1] > shared[2] > shared[4]
    assert shared[3] == 200
    assert shared[4] == 0


def test_the_directions_are_the_same_on_every_machine():
    layer = LayerSpec(3, 1, 1, 64, 64, 0.125)
    directions = Lsh(8, 128, 1, 0, seed=5)._directions_of(layer, torch.device("cpu"))
    digest = hashlib.sha256(directions.numpy().astype("<f4").tobytes()).hexdigest()
    assert digest.startswith("517c6488dd9eeaf3")
    for changed in (Lsh(8, 128, 1, 0, seed=6), Lsh(8, 128, 1, 0, seed=5 + (1 << 40))):
        assert not torch.equal(changed._directions_of(layer, torch.device("cpu")), directions)
    elsewhere = LayerSpec(4, 1, 1, 64, 64, 0.125)
    pattern = Lsh(8, 128, 1, 0, seed=5)
    assert not torch.equal(pattern._directions_of(elsewhere, torch.device("cpu")), directions)
    assert torch.equal(pattern._directions_of(layer, torch.device("cpu")), directions)


def test_a_slot_that_is_used_again_has_the_buckets_of_its_new_key():
    layer = LayerSpec(0, 2, 2, 8, 8, 0.3)
    pattern = Lsh(hashes=2, buckets=8, window=1, sinks=0)
    cache = PagedCache([layer], 4, 4, torch.float32, pattern=pattern, poison=True).layers[0]
    random = torch.Generator().manual_seed(0)
    for pages, computed, count in (([1, 2, 3], 0, 12), ([3, 1], 0, 5), ([3, 1], 5, 2)):
        batch = AttentionBatch.build([computed], [count], [pages], 4)
        keys = torch.randn(count, 2, 8, generator=random)
        cache.write(batch.device.slots, keys, keys)
        update(pattern, layer, cache, batch)
        assert torch.equal(cache.summary.flatten(0, 1)[batch.device.slots], pattern._hash(layer, keys))
    # The slot behind the last token still has the buckets of an earlier sequence.
    assert torch.equal(cache.summary[1, 3], pattern._hash(layer, cache.keys[1, 3]))


def test_summaries_take_a_byte_for_each_round():
    specs = [LayerSpec(i, 4, 2, 64, 64, 0.125) for i in range(3)]
    bare = PagedCache.bytes_per_page(specs, 16, torch.bfloat16)
    pattern = Lsh(8, 128, 128, 4, dense_layers=(1,))
    assert PagedCache.bytes_per_page(specs, 16, torch.bfloat16, pattern) == bare + 2 * 16 * 2 * 8
    many = Lsh(8, 300, 128, 4, dense_layers=(1,))
    assert PagedCache.bytes_per_page(specs, 16, torch.bfloat16, many) == bare + 2 * 16 * 2 * 8 * 2


def test_options():
    defaults = {
        "hashes": "8",
        "buckets": "128",
        "window": "128",
        "sinks": "4",
        "seed": "0",
        "dense_layers": "",
    }
    assert from_options({"pattern": "lsh"}).options == defaults
    specs = [LayerSpec(i, 4, 2, 64, 64, 0.125) for i in range(3)]
    given = {"pattern": "lsh", "buckets": "30", "seed": "3", "dense_layers": "1"}
    attention = resolve("sparse", given, "auto", specs, "cpu", torch.float32, 16)
    assert attention.options == {**defaults, **given}
    for wrong in ("7", "32770"):
        with pytest.raises(
            ValueError, match=f"buckets is '{wrong}'; it must be an even number of at most 32768"
        ):
            from_options({"pattern": "lsh", "buckets": wrong})
    with pytest.raises(ValueError, match="window is '0'; it must be a whole number of at least 1"):
        from_options({"pattern": "lsh", "window": "0"})
