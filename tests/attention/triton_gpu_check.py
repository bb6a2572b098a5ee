"""Checks the Triton kernel on a GPU, for a person to read: python -m tests.attention.triton_gpu_check.

First equality with the oracle over a grid of shapes, patterns and dtypes, then times against torch's
own attention. Most of the time goes into compiling. Ends with 1 where a result is wrong, 2 without a GPU.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

from attention import AttentionBatch, LayerSpec, PagedCache
from attention.kernels.base import Kernel, Kind
from attention.kernels.reference import Reference
from attention.kernels.triton_paged import Triton
from attention.patterns.base import Pattern
from attention.patterns.bigbird import BigBird
from attention.patterns.full import Full
from attention.patterns.lsh import Lsh
from attention.patterns.sliding_window import SlidingWindow
from attention.patterns.topk import TopK
from attention.visible import Visible
from tests.attention.cases import Case, attend, make_case

DEVICE = "cuda"
ERRORS = {torch.float32: 1e-5, torch.bfloat16: 4 * 2**-7, torch.float16: 4 * 2**-10}
BATCH = [(1, 1), (900, 1), (2500, 1), (300, 300), (1200, 200), (700, 5)]
PROMPTS = [1, 700, 2400, 300, 1100, 698]

# query heads, KV heads, head size, value size
SHAPES = [
    (32, 8, 128, 128),
    (8, 8, 80, 80),
    (10, 2, 192, 128),
    (71, 1, 64, 64),
    (8, 4, 256, 256),
    (8, 4, 512, 512),
]
SMOLLM = (9, 3, 64, 64)


def rerotating() -> Pattern:
    pattern = SlidingWindow(200, 4)
    pattern.rerotated = 4
    return pattern


def patterns() -> list[Pattern]:
    content: list[Pattern] = [TopK(256, 1, 4), Lsh(4, 32, 64, 4)]
    return [Full(), SlidingWindow(500, 4), rerotating(), BigBird(64, 3, 3, 0), *content]


def compute(kernel: Kernel, case: Case, pattern: Pattern) -> torch.Tensor:
    rerotated = case.query.flip(0) if pattern.rerotated else None
    return attend(kernel, case.layer, case.query, case.cache, case.batch, pattern, case.sinks, rerotated)


def case_of(layer: LayerSpec, pattern: Pattern, dtype: torch.dtype, page_size: int) -> Case:
    return make_case(
        layer, BATCH, page_size, pattern=pattern, dtype=dtype, device=DEVICE, prompt_lens=PROMPTS
    )


def wrong(layer: LayerSpec, pattern: Pattern, dtype: torch.dtype, page_size: int) -> str:
    """The fault of the result, if any."""
    case = case_of(layer, pattern, dtype, page_size)
    result, expected = compute(Triton(), case, pattern), compute(Reference(), case, pattern)
    try:
        torch.testing.assert_close(result, expected, rtol=ERRORS[dtype], atol=ERRORS[dtype])
    except AssertionError as error:
        return " ".join(str(error).split())
    return ""


def plain(shape: tuple[int, int, int, int]) -> LayerSpec:
    return LayerSpec(0, *shape, shape[2] ** -0.5)


def check() -> int:
    """The number of combinations whose result is wrong."""
    failed = count = 0
    begin = time.perf_counter()
    bfloat = torch.bfloat16
    grid = [(plain(SMOLLM), pattern, bfloat, 16) for pattern in patterns()]
    grid += [(plain(SMOLLM), Full(), bfloat, page_size) for page_size in (24, 256)]
    grid += [(plain(shape), Full(), bfloat, 16) for shape in SHAPES]
    grid += [(plain(SMOLLM), Full(), dtype, 16) for dtype in (torch.float16, torch.float32)]
    featured = LayerSpec(0, 12, 4, 64, 64, 0.125, window=300, softcap=20.0, sinks=True)
    grid += [(featured, pattern, bfloat, 16) for pattern in (Full(), rerotating(), TopK(256, 1, 4))]
    grid += [(featured, rerotating(), torch.float32, 16)]
    for layer, pattern, dtype, page_size in grid:
        text = wrong(layer, pattern, dtype, page_size)
        count += 1
        if text:
            failed += 1
            print(f"WRONG {pattern.name} page {page_size} {dtype} {layer}: {text}", flush=True)
    print(f"{count - failed} of {count} combinations equal the oracle ({time.perf_counter() - begin:.0f} s)")
    return failed


def milliseconds(call: Callable[[], object], repeats: int = 20) -> float:
    """The median time of a call, the device's queue empty before and after."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeats // 2]


def serving(layer: LayerSpec, sizes: list[tuple[int, int]], dtype: torch.dtype) -> Case:
    """A batch of (length, query tokens) on random numbers, pages of 16 tokens shuffled."""
    counts = [-(-length // 16) for length, _ in sizes]
    cache = PagedCache([layer], sum(counts) + 1, 16, dtype, DEVICE).layers[0]
    cache.keys.normal_()
    cache.values.normal_()
    pages = (torch.randperm(sum(counts)) + 1).split(counts)
    batch = AttentionBatch.build(
        [length - queries for length, queries in sizes],
        [queries for _, queries in sizes],
        [own.tolist() for own in pages],
        16,
        DEVICE,
    )
    query = torch.randn(
        batch.host.query_starts[-1], layer.query_heads, layer.head_size, dtype=dtype, device=DEVICE
    )
    return Case(layer, cache, batch, query, [], [], None)


WORKS = {
    "decode 1 x 2048": [(2048, 1)],
    "decode 1 x 32768": [(32768, 1)],
    "decode 8 x 2048": [(2048, 1)] * 8,
    "decode 64 x 2048": [(2048, 1)] * 64,
    "decode 16 x 32768": [(32768, 1)] * 16,
    "prefill 2048": [(2048, 2048)],
    "prefill 8192": [(8192, 8192)],
    "chunk 512 at 32768": [(32768, 512)],
}


def own_time(case: Case, pattern: Pattern, fresh: bool) -> float:
    """Milliseconds of the kernel, with ``fresh`` including the plan that the host makes once per step."""
    kernel, kind = Triton(), Kind.of(case.layer, pattern, case.query, case.cache)
    plan = kernel.plan(kind, case.batch)

    def call() -> None:
        again = AttentionBatch(Visible(case.batch.host), case.batch.device)
        used = kernel.plan(kind, again) if fresh else plan
        kernel.forward(case.layer, case.query, case.cache, used, case.sinks)

    return milliseconds(call)


def torch_time(layer: LayerSpec, sizes: list[tuple[int, int]], dtype: torch.dtype) -> float:
    """Milliseconds of torch's attention on contiguous keys, which no paged cache has.

    A later chunk would need a mask, with which torch's fast kernel does not work: there it sees all keys.
    """
    length, queries = sizes[0]
    shapes = [(layer.query_heads, queries), (layer.kv_heads, length), (layer.kv_heads, length)]
    q, k, v = (
        torch.randn(len(sizes), *shape, layer.head_size, dtype=dtype, device=DEVICE) for shape in shapes
    )
    causal = queries == length
    return milliseconds(lambda: scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True))


def times() -> None:
    """Prints a table of times."""
    dtype = torch.bfloat16
    columns = ["triton", "planned", "window", "torch", "GB/s", "TFLOP/s"]
    print("\nms per layer in bfloat16, page 16; planned: with the plan that the host makes once per step;")
    print("window: 1020 tokens and 4 sinks, torch: see torch_time; GB/s and TFLOP/s: of the first column")
    print(f"{'heads':>12} {'work':>20}", *(f"{column:>8}" for column in columns))
    for shape in (SMOLLM, SHAPES[0]):
        layer = plain(shape)
        for name, sizes in WORKS.items():
            case = serving(layer, sizes, dtype)
            took = own_time(case, Full(), False)
            numbers = [took, own_time(case, Full(), True), own_time(case, SlidingWindow(1020, 4), False)]
            numbers.append(torch_time(layer, sizes, dtype))
            read = sum(length for length, _ in sizes) * layer.kv_heads * 2 * layer.head_size * dtype.itemsize
            pairs = sum(rows * length - rows * (rows - 1) // 2 for length, rows in sizes)
            numbers += [read / took / 1e6, 4 * pairs * layer.query_heads * layer.head_size / took / 1e9]
            heads = f"{layer.query_heads}/{layer.kv_heads} x {layer.head_size}"
            print(f"{heads:>12} {name:>20}", *(f"{number:8.3f}" for number in numbers), flush=True)


def main() -> int:
    if not torch.cuda.is_available():
        print("This check needs a GPU; torch.cuda.is_available() says there is none.", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    failed = check()
    times()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
