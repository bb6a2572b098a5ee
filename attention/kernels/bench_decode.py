"""``python -m attention.kernels.bench_decode``: the time of one layer's attention in a decode step.

The kernels take turns, a step each, so that other load on the machine affects all of them alike; times are
medians over steps, ratios medians over pairs. A step computes so many layers, each over its own KV cache,
that they exceed the processor's caches. The layers of a step share one plan.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from attention.batch import AttentionBatch
from attention.cache import PagedCache
from attention.dtypes import CACHE_DTYPES
from attention.kernels.base import Kernel, Kind
from attention.kernels.cpu.paged import CpuPaged
from attention.kernels.sdpa import Sdpa
from attention.kernels.step_plans import StepPlans
from attention.patterns.full import Full
from attention.types import LayerSpec

# Sequences, and tokens of each.
SHAPES = [(1, 512), (1, 2048), (1, 8192), (8, 512), (8, 2048), (32, 128), (32, 512)]

# Bytes of KV cache to read, more than processors cache, and the most layers to spread them over.
_BYTES = 256 << 20
_LAYERS = 30


def main() -> int:
    """Prints one line per dtype and shape."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", nargs="+", default=[f"{b}x{n}" for b, n in SHAPES], metavar="BATCHxLENGTH"
    )
    parser.add_argument("--dtypes", nargs="+", default=list(CACHE_DTYPES), choices=list(CACHE_DTYPES))
    parser.add_argument("--heads", type=int, nargs=3, default=(9, 3, 64), metavar=("QUERY", "KV", "SIZE"))
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=15, help="per kernel")
    arguments = parser.parse_args()
    heads, kv_heads, size = arguments.heads
    print(
        f"microseconds per layer and step; {heads} query heads over {kv_heads} KV heads of {size}, page "
        f"{arguments.page_size}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    print(f"{'':11} {'batch x length':>14} {'cpu_paged':>10} {'sdpa':>10} {'contiguous':>10}   sdpa/ cont/")
    for name in arguments.dtypes:
        for shape in arguments.shapes:
            batch, length = map(int, shape.split("x"))
            layer = LayerSpec(0, heads, kv_heads, size, size, size**-0.5)
            times = measure(layer, batch, length, arguments.page_size, CACHE_DTYPES[name], arguments.steps)
            paged, sdpa, contiguous = (statistics.median(column) for column in times)
            print(
                f"{name:11} {shape:>14} {paged:10.0f} {sdpa:10.0f} {contiguous:10.0f}   "
                f"{_ratio(times[1], times[0]):5.2f} {_ratio(times[2], times[0]):5.2f}",
                flush=True,
            )
    return 0


def measure(
    layer: LayerSpec, batch: int, length: int, page_size: int, dtype: torch.dtype, steps: int
) -> tuple[list[float], list[float], list[float]]:
    """Microseconds per layer of each step: cpu_paged, sdpa, and torch's SDPA on contiguous keys.

    If the cache has 8 bits, queries and contiguous keys have 32.
    """
    per_sequence = -(-length // page_size)
    order = torch.randperm(batch * per_sequence, generator=torch.Generator().manual_seed(0)) + 1
    pages = order.view(batch, per_sequence).tolist()
    bytes_per_layer = batch * length * layer.kv_heads * (layer.head_size + layer.value_size) * dtype.itemsize
    count = min(_LAYERS, _BYTES // bytes_per_layer + 2)
    layers = [LayerSpec(i, *[getattr(layer, f) for f in _FIELDS]) for i in range(count)]
    cache = PagedCache(layers, 1 + len(order), page_size, dtype)
    for part in cache.layers.values():
        part.keys.copy_(torch.randn(part.keys.shape))
        part.values.copy_(torch.randn(part.values.shape))
    own = torch.float32 if dtype.itemsize == 1 else dtype
    rows = [
        tuple(torch.randn(batch, layer.kv_heads, length, layer.head_size).to(own) for _ in "kv")
        for _ in layers
    ]
    query = torch.randn(batch, layer.query_heads, layer.head_size).to(own)
    grouped = query.unflatten(1, (layer.kv_heads, -1))

    def paged(kernel: Kernel[Any]) -> None:
        there = [length - 1] * batch
        step = AttentionBatch.build(there, [1] * batch, pages, page_size, prompt_lens=there)
        plans = StepPlans(kernel, step)
        for spec in layers:
            kernel.forward(spec, query, cache.layers[spec.index], plans.of(kind), None)

    def contiguous() -> None:
        for keys, values in rows:
            scaled_dot_product_attention(grouped, keys, values, scale=layer.scale)

    kind, fast, slow = Kind.of(layer, Full(), query, cache.layers[0]), CpuPaged(), Sdpa()
    runs: list[Callable[[], None]] = [lambda: paged(fast), lambda: paged(slow), contiguous]
    times: tuple[list[float], list[float], list[float]] = ([], [], [])
    for step in range(steps + 1):
        for run, column in zip(runs, times, strict=True):
            begin = time.perf_counter()
            run()
            if step:  # the first warms up
                column.append((time.perf_counter() - begin) / count * 1e6)
    return times


_FIELDS = ("query_heads", "kv_heads", "head_size", "value_size", "scale")


def _ratio(slower: list[float], faster: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


if __name__ == "__main__":
    raise SystemExit(main())
