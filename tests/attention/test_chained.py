"""Attention as native calls equals attention layer by layer, to the last bit."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import AttentionBatch, LayerSpec, PagedCache, resolve
from attention.dtypes import CACHE_DTYPES, cast
from attention.kernels.cpu.chain import Chain
from attention.kernels.cpu.chained import ChainedAttention
from attention.kernels.cpu.paged import CpuPaged
from attention.patterns.full import Full
from tests.attention.cases import attend, patterns

DTYPES = list(CACHE_DTYPES.values())
CPU = torch.device("cpu")


def layers_of(windows: list[int | None]) -> list[LayerSpec]:
    return [LayerSpec(i, 6, 2, 24, 24, 0.2, window=window) for i, window in enumerate(windows)]


def batch_of(lengths: list[tuple[int, int]], page_size: int) -> tuple[AttentionBatch, int]:
    """Sequences of (computed tokens, tokens to compute), on shuffled pages.

    The tokens to come of every second one belong to its prompt.
    """
    counts = [-(-sum(length) // page_size) for length in lengths]
    ends = [sum(counts[: b + 1]) for b in range(len(counts))]
    pages = [list(range(end, end - count, -1)) for end, count in zip(ends, counts, strict=True)]
    computed, added = zip(*lengths, strict=True)
    prompt_lens = [sum(length) if b % 2 else length[0] for b, length in enumerate(lengths)]
    batch = AttentionBatch.build(computed, added, pages, page_size, prompt_lens=prompt_lens)
    return batch, sum(counts) + 1


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 70), st.integers(1, 70)), min_size=1, max_size=4),
    st.lists(st.sampled_from([None, None, 7, 40]), min_size=1, max_size=4),
    patterns,
    st.integers(1, 20),
    st.sampled_from(DTYPES),
    st.integers(0, 1 << 30),
)
def test_chained_attention_writes_and_attends_as_layers_do(lengths, windows, pattern, page_size, dtype, seed):
    layers = layers_of(windows)
    attention = resolve("full", {}, "cpu_paged", layers, CPU, dtype, page_size)
    batch, pages = batch_of(lengths, page_size)
    random = torch.Generator().manual_seed(seed)
    caches = [PagedCache(layers, pages, page_size, dtype, poison=True) for _ in range(2)]
    for layer in layers:
        shape = caches[0].layers[layer.index].keys.shape
        past = torch.randn(2, *shape, generator=random).to(dtype)
        for cache in caches:
            cache.layers[layer.index].keys.copy_(past[0])
            cache.layers[layer.index].values.copy_(past[1])
    rows = torch.randn(len(batch.device.slots), 10, 24, generator=random)
    query, key, value = rows.split([6, 2, 2], dim=1)

    ruled = [(layer, pattern) for layer in layers]
    if reason := ChainedAttention.obstacle(attention.kernel, ruled):
        assert pattern.rerotated or hasattr(pattern, "select"), reason
        return
    chained = ChainedAttention(attention.kernel, ruled, caches[0])
    for layer in layers:
        output = torch.full((len(batch.device.slots), 6, 24), float("nan"))
        chained.prepare(batch, chained.given(batch), query, key, value, output)
        Chain(chained.calls[layer.index]).run()
        own = caches[1].layers[layer.index]
        own.write(batch.device.slots, key, value)
        expected = attend(attention.kernel, layer, query, own, batch, pattern, None)
        assert torch.equal(output, expected)
        for one, other in zip(caches[0].layers[layer.index][:2], own[:2], strict=True):
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_are_written_as_torch_rounds_them(dtype):
    layers = layers_of([None])
    special = torch.tensor(
        [
            0.0,
            -0.0,
            float("inf"),
            -float("inf"),
            65519.0,
            65519.99,
            65520.0,
            -7e4,
            3.3895e38,
            6e-8,
            2.98e-8,
            3e-8,
            448.0,
            -464.0,
            464.0001,
            -480.0,
            2**-10,
            1.001 * 2**-10,
            3 * 2**-10,
            15.5 * 2**-10,
        ]
    )
    bits = torch.randint(-(1 << 31), 1 << 31, (40000,), generator=torch.Generator().manual_seed(0))
    numbers = torch.cat([special, bits.to(torch.int32).view(torch.float32)])
    # Halfway between two of the dtype's numbers, and beside it.
    half = 0x80000 if dtype == torch.float8_e4m3fn else 0x1000
    middle = (numbers[:20000].to(dtype).float().view(torch.int32) | half).view(torch.float32)
    numbers = torch.cat([numbers, middle, middle.nextafter(torch.tensor(0.0))])
    numbers = numbers[~numbers.isnan()]
    numbers = numbers[: len(numbers) // 96 * 96].view(-1, 4, 24)
    batch, pages = batch_of([(0, len(numbers))], 16)
    cache = PagedCache(layers, pages, 16, dtype, poison=True)
    attention = resolve("full", {}, "cpu_paged", layers, CPU, dtype, 16)
    chained = ChainedAttention(attention.kernel, attention.ruled_layers, cache)
    key, value = numbers.split([2, 2], dim=1)
    query = torch.zeros(len(numbers), 6, 24)
    chained.prepare(batch, chained.given(batch), query, key, value, query)
    Chain(chained.calls[0][:1]).run()
    where = batch.device.slots
    assert dtype == torch.float32 or cast(key, dtype).isnan().any()
    for written, numbers in zip(cache.layers[0][:2], (key, value), strict=True):
        expected = cast(numbers, dtype)
        torch.testing.assert_close(written.flatten(0, 1)[where], expected, rtol=0, atol=0, equal_nan=True)


def test_nan_is_written_as_nan():
    layers = layers_of([None])
    batch, pages = batch_of([(0, 1)], 16)
    for dtype in DTYPES:
        cache = PagedCache(layers, pages, 16, dtype)
        chained = ChainedAttention(CpuPaged(), [(layer, Full()) for layer in layers], cache)
        key = torch.full((1, 2, 24), float("nan"))
        query = torch.zeros(1, 6, 24)
        chained.prepare(batch, chained.given(batch), query, key, key, query)
        Chain(chained.calls[0][:1]).run()
        assert cache.layers[0].keys.flatten(0, 1)[batch.device.slots].isnan().all()
        assert cache.layers[0].values.flatten(0, 1)[batch.device.slots].isnan().all()


def test_obstacles_to_chaining_are_named():
    layers = layers_of([None])

    def obstacle(layers, backend="full", kernel="auto", options=None):
        attention = resolve(backend, options or {}, kernel, layers, CPU, torch.float32, 16)
        return ChainedAttention.obstacle(attention.kernel, attention.ruled_layers)

    assert obstacle(layers) is None
    assert obstacle(layers, kernel="reference") == "kernel reference is not native code for the CPU"
    assert obstacle(layers, "sparse", options={"pattern": "lsh"}) == "lsh selects keys in torch"
    assert obstacle(layers, "sparse", options={"pattern": "topk", "dense_layers": ""}) is None
    rerotated = {"window": "32", "sinks": "4", "positions": "cache"}
    assert obstacle(layers, "sliding_window", options=rerotated) == "sliding_window rerotates keys"
    assert obstacle([replace(layers[0], sinks=True)]) == "layer 0 has learned sinks"
