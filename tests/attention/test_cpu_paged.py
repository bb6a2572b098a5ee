"""The C++ kernel against the oracle, in every dtype."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import LayerSpec, UnsupportedError, resolve
from attention.dtypes import CACHE_DTYPES
from attention.kernels.base import Kernel
from attention.kernels.cpu import calls, native
from attention.kernels.cpu.paged import CpuPaged
from attention.kernels.reference import Reference
from attention.patterns.base import Pattern
from attention.patterns.full import Full
from attention.patterns.sliding_window import SlidingWindow
from tests.attention.cases import (
    Case,
    attend,
    by_definition,
    content_patterns,
    layers,
    make_case,
    patterns,
    sequences,
)
from tests.cover import every_pair
from tests.engine.harness import greedy_requests, load, make_core, run
from tests.instructions import at, every_level
from tests.models_zoo import save_tiny

DTYPES = list(CACHE_DTYPES.values())
CPU = torch.device("cpu")
PLAIN = LayerSpec(0, 6, 2, 8, 8, 0.35)

page_sizes = st.integers(1, 32)
seeds = st.integers(0, 1 << 30)
# Prompt lengths by which rows belong to prompts, or come after them, as decode rows do.
written = st.sampled_from([lambda shapes: None, lambda shapes: [1] * len(shapes)])


def compute(
    kernel: Kernel, case: Case, pattern: Pattern, rerotated: torch.Tensor | None = None
) -> torch.Tensor:
    return attend(kernel, case.layer, case.query, case.cache, case.batch, pattern, case.sinks, rerotated)


def check(case: Case, pattern: Pattern, rerotated: torch.Tensor | None = None) -> None:
    dtype = case.query.dtype
    result = compute(CpuPaged(), case, pattern, rerotated)
    assert result.dtype == case.query.dtype
    # The result is rounded to the cache's dtype and, where the processor multiplies bfloat16, the query too.
    error = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(result, compute(Reference(), case, pattern, rerotated), rtol=error, atol=error)


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """If it can't be compiled, it must say why; the tests below would then prove nothing."""
    assert CpuPaged().unsupported([PLAIN], CPU, torch.float32, 16, Full()) == []


@settings(max_examples=20, deadline=None)
@given(
    layers(features=True), sequences(300, 6), page_sizes, patterns, seeds, st.sampled_from(DTYPES), written
)
def test_equals_reference(layer, shapes, page_size, pattern, seed, dtype, prompts):
    prompt_lens = prompts(shapes)
    case = make_case(
        layer, shapes, page_size, pattern=pattern, dtype=dtype, seed=seed, prompt_lens=prompt_lens
    )
    check(case, pattern)


@settings(max_examples=15, deadline=None)
@given(layers(features=True), sequences(150, 4), page_sizes, seeds, content_patterns(), st.data())
def test_rows_that_select_by_content(layer, shapes, page_size, seed, pattern, data):
    prompt_lens = [data.draw(st.integers(1, length + 1)) for length, _ in shapes]
    check(make_case(layer, shapes, page_size, pattern=pattern, seed=seed, prompt_lens=prompt_lens), pattern)


@settings(max_examples=15, deadline=None)
@given(
    layers(features=True),
    sequences(200, 4),
    page_sizes,
    seeds,
    st.integers(1, 40),
    st.integers(0, 9),
    written,
    st.data(),
)
def test_queries_rerotated_toward_the_first_keys(
    layer, shapes, page_size, seed, window, sinks, prompts, data
):
    pattern = SlidingWindow(window, sinks)
    pattern.rerotated = data.draw(st.integers(1, sinks + 2), label="rerotated")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    case = make_case(
        layer, shapes, page_size, pattern=pattern, seed=seed, dtype=dtype, prompt_lens=prompts(shapes)
    )
    rerotated = torch.randn(case.query.shape, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    check(case, pattern, rerotated)


@every_pair(
    sizes=[(9, 3, 64, 64), (5, 1, 80, 72), (14, 2, 128, 128), (1, 1, 33, 257), (130, 1, 4, 4)],
    dtype=DTYPES,
    window=[None, 600],
)
def test_long_sequences(sizes, dtype, window):
    """Rows in many parts, blocks of rows, heads that do and don't fill vectors, groups of any size."""
    layer = LayerSpec(0, *sizes, scale=sizes[2] ** -0.5, window=window)
    shapes = [(1700, 1), (4200, 9), (3, 1), (900, 2), (300, 300), (1100, 1)]
    check(make_case(layer, shapes, 16, dtype=dtype, prompt_lens=[1700, 1, 1, 1, 300, 1]), Full())


@settings(max_examples=12, deadline=None)
@given(
    layers(features=True), sequences(600, 6), page_sizes, patterns, seeds, st.sampled_from(DTYPES), written
)
def test_neighbors_and_threads_change_no_bit(layer, shapes, page_size, pattern, seed, dtype, prompts):
    prompt_lens = prompts(shapes)
    case = make_case(
        layer, shapes, page_size, pattern=pattern, seed=seed, dtype=dtype, prompt_lens=prompt_lens
    )
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        batched = compute(CpuPaged(), case, pattern)
        torch.set_num_threads(1)
        for b in range(len(shapes)):
            rows = batched[case.batch.host.query_starts[b] : case.batch.host.query_starts[b + 1]]
            assert torch.equal(rows, compute(CpuPaged(), case.only(b), pattern))
    finally:
        torch.set_num_threads(threads)


@every_pair(
    lengths=[(1700,), (130, 1700), (127, 128, 600, 5, 300)],
    dtype=DTYPES,
    prompt=[True, False],
)
def test_cuts_large_enough_for_threads_change_no_bit(lengths, dtype, prompt):
    """Parts by several threads, and with more threads than parts also heads apart from each other."""
    shapes = [(length, 1) for length in lengths]
    case = make_case(
        LayerSpec(0, 9, 3, 64, 64, 0.125),
        shapes,
        16,
        dtype=dtype,
        prompt_lens=None if prompt else [1] * len(lengths),
    )
    check(case, Full())
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = [compute(CpuPaged(), case.only(b), Full()) for b in range(len(lengths))]
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            assert torch.equal(compute(CpuPaged(), case, Full()), torch.cat(single))
    finally:
        torch.set_num_threads(before)


def test_large_logits_and_small_ones():
    """The running maximum moves by more than exponentials can hold, in one row and in a block."""
    case = make_case(LayerSpec(0, 2, 1, 8, 8, 4.0), [(700, 1), (700, 100)], 16, prompt_lens=[1, 1])
    case.cache.keys[1:] *= torch.linspace(0, 12, len(case.cache.keys) - 1)[:, None, None, None]
    expected = compute(Reference(), case, Full())
    # Logits of some hundreds, rounded to 24 bits.
    torch.testing.assert_close(compute(CpuPaged(), case, Full()), expected, rtol=1e-4, atol=1e-4)


def test_weights_are_exact_to_float32():
    """Values are one-hot, so that a row is its weights: from 1 down to where float32's numbers end."""
    length = 300
    layer = LayerSpec(0, 1, 1, 1, length, 1.0)
    case = make_case(layer, [(length, length)], 16)
    logits = (torch.arange(length) * 37 % length) * -0.3
    case.query[:] = 1
    case.cache.write(case.batch.device.slots, logits[:, None, None], torch.eye(length)[:, None])
    result = compute(CpuPaged(), case, Full())[:, 0].double()
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    expected = logits.double().expand(length, length).masked_fill(~causal, -math.inf).softmax(dim=-1)
    # Logits to the base of 2 are rounded to 24 bits, which for -87 is an error of 5e-6 in the weight.
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-37)
    near = causal & (expected > 0.05)
    torch.testing.assert_close(result[near], expected[near], rtol=5e-7, atol=0)


@every_pair(rows=[1, 2, 16, 17, 85, 86, 257], heads=[(9, 3), (4, 4), (8, 1)], dtype=DTYPES)
def test_blocks_of_any_number_of_rows(rows, heads, dtype):
    """Panels that are full, begun, or hold one query; tiles that none, some or all of their queries see."""
    case = make_case(LayerSpec(0, *heads, 24, 40, 0.2), [(rows + 130, rows)], 16, dtype=dtype)
    check(case, Full())
    check(case, SlidingWindow(window=70, sinks=3))


def test_a_cache_of_fewer_bits_than_the_model():
    case = make_case(PLAIN, [(40, 1), (30, 12), (20, 20)], 8, dtype=torch.bfloat16)
    case.query = case.query.float()
    result = compute(CpuPaged(), case, Full())
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), by_definition(case, Full()), rtol=0.01, atol=0.01)


def test_queries_as_models_give_them():
    """Heads before tokens, and rerotated ones in another layout."""
    pattern = SlidingWindow(9, 3)
    pattern.rerotated = 3
    case = make_case(PLAIN, [(40, 1), (30, 12)], 8, pattern=pattern)
    rerotated = torch.randn(case.query.shape)
    expected = compute(Reference(), case, pattern, rerotated)
    for lay in (torch.contiguous_format, None):
        case.query = case.query.transpose(0, 1).contiguous().transpose(0, 1)
        if lay is None:
            case.query = case.query.transpose(1, 2).contiguous().transpose(1, 2)
        torch.testing.assert_close(
            compute(CpuPaged(), case, pattern, rerotated), expected, rtol=1e-5, atol=1e-5
        )


def test_nan_shows():
    """A broken model must not give a plausible answer."""
    for spoiled in ("keys", "values"):
        case = make_case(PLAIN, [(40, 1), (40, 30)], 8)
        table = case.batch.device.page_table
        for b in range(2):
            getattr(case.cache, spoiled)[table[b, 0], 5] = float("nan")
        assert compute(CpuPaged(), case, Full()).isnan().all()


@pytest.mark.parametrize("queries", [1, 2], ids=["a row", "a block"])
def test_every_number_of_8_bits_is_read(queries):
    """One value each; NaN stays NaN."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    case = make_case(LayerSpec(0, 1, 1, 1, 256, 1.0), [(queries, queries)], 4, dtype=torch.float8_e4m3fn)
    case.cache.write(case.batch.device.slots, torch.zeros(queries, 1, 1), codes.expand(queries, 1, -1))
    expected = codes.float().expand(queries, 1, -1)
    torch.testing.assert_close(compute(CpuPaged(), case, Full()), expected, rtol=0, atol=0, equal_nan=True)
    assert expected.isnan().sum() == 2 * queries


def test_half_precision_is_read_to_the_bit():
    """Subnormal, largest and infinite numbers."""
    case = make_case(LayerSpec(0, 1, 1, 1, 1, 1.0), [(1, 1)], 1, dtype=torch.float16)
    for number in (6e-8, -6e-8, 6e-5, 65504.0, -1.5, 0.0, float("inf"), float("-inf")):
        case.cache.values[1] = number
        assert torch.equal(compute(CpuPaged(), case, Full()).flatten(), case.cache.values[1].flatten())


def test_missing_pages_are_not_read():
    pattern = SlidingWindow(window=5, sinks=2)
    case = make_case(LayerSpec(0, 2, 1, 4, 4, 0.5), [(100, 1), (90, 20)], 4, pattern=pattern)
    assert (case.batch.device.page_table[:, 1:10] == 0).all()
    check(case, pattern)
    check(case, Full())


def test_refusals():
    kernel = CpuPaged()
    assert kernel.unsupported([PLAIN], torch.device("cuda"), torch.float64, 16, Full()) == [
        "cpu_paged computes on the CPU, not on cuda",
        "cpu_paged reads float32, bfloat16, float16 or float8_e4m3, not float64",
    ]


@pytest.fixture
def not_yet_compiled():
    calls.compiled.cache_clear()
    native._attempt.cache_clear()
    yield
    calls.compiled.cache_clear()
    native._attempt.cache_clear()


@every_level
def test_at_every_level(level):
    """All dtypes, single rows and blocks, parts; threads change no bit."""
    grouped = LayerSpec(0, 9, 3, 64, 64, 0.125)
    odd = LayerSpec(0, 5, 1, 20, 12, 0.2, window=50, softcap=8.0, sinks=True)
    shapes, prompt_lens = [(200, 1), (190, 100), (70, 9), (90, 1)], [200, 190, 70, 1]
    long, given_lens = [(1500, 1), (4200, 70)], [1, 4200]
    with at(level):
        for dtype in DTYPES:
            for layer in (grouped, odd):
                for pattern in (Full(), SlidingWindow(window=33, sinks=5)):
                    case = make_case(layer, shapes, 16, pattern=pattern, dtype=dtype, prompt_lens=prompt_lens)
                    check(case, pattern)
            case = make_case(grouped, long, 16, dtype=dtype, prompt_lens=given_lens)
            check(case, Full())
            results = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                results.append(compute(CpuPaged(), case, Full()))
            assert torch.equal(*results)


@every_level
def test_numbers_are_read_to_the_bit_at_every_level(level):
    with at(level):
        test_half_precision_is_read_to_the_bit()
        test_nan_shows()
        for queries in (1, 2):
            test_every_number_of_8_bits_is_read(queries)


def choose(kernel="auto"):
    return resolve("full", {}, kernel, [PLAIN], CPU, torch.float32, 16)


def test_auto_takes_it(not_yet_compiled):
    assert choose().kernel.name == "cpu_paged"


def test_without_a_compiler_auto_goes_on_and_says_why(not_yet_compiled, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    attention = choose()
    assert attention.kernel.name == "sdpa"
    assert "cpu_paged cannot be compiled here: there is no C++ compiler; install one" in attention.reason
    with pytest.raises(UnsupportedError, match=r"install one .* choose kernel sdpa or auto"):
        choose("cpu_paged")


def test_without_gnu_openmp_auto_goes_on_and_says_why(not_yet_compiled, monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
    attention = choose()
    assert attention.kernel.name == "sdpa"
    assert "its threads are GNU OpenMP's, which this torch does not use" in attention.reason


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_an_engine_that_uses_it_writes_what_one_with_the_oracle_does(tmp_path, kind):
    loaded = load(save_tiny(kind, tmp_path / kind))
    rng = random.Random(0)
    prompts = [[rng.randrange(4, loaded.vocabulary_size) for _ in range(n)] for n in (1, 4, 30, 71)]

    def tokens(kernel):
        core = make_core(loaded, kernel=kernel, page_size=4, max_batch_tokens=20, max_running=9)
        return [outcome.tokens for outcome in run(core, greedy_requests(prompts, 12)).values()]

    assert tokens("cpu_paged") == tokens("reference")
