"""For a machine with a GPU: every kernel that calls a CUDA package equals ``Reference``, with that package.

    python -m tests.attention.gpu_check [--seconds 110]

Says which packages are not there, and ends with 1 if a result differs.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator

import torch

from attention import LayerSpec
from attention.kernels import flash_attn
from attention.kernels.base import Kernel
from attention.kernels.cuda_packages import is_installed
from attention.kernels.flash_attn import FlashAttn
from attention.kernels.reference import Reference
from attention.kernels.varlen import Varlen
from attention.kernels.xformers import Xformers
from attention.patterns.base import Pattern
from attention.patterns.full import Full
from attention.patterns.sliding_window import SlidingWindow
from tests.attention.cases import attend, make_case

# Name and module of the package, the kernel, the page sizes to try, whether it caps logits and takes sinks.
CANDIDATES: list[tuple[str, str, type[Kernel], tuple[int, ...], bool, bool]] = [
    ("FA3", "flash_attn_interface", FlashAttn, (16, 256), True, False),
    ("FA2", "flash_attn", FlashAttn, (256, 512), True, False),
    ("FA4", "flash_attn.cute", FlashAttn, (16, 128), True, True),
    ("varlen", "torch", Varlen, (16, 256), False, False),
    ("xformers", "xformers", Xformers, (64, 128), False, False),
]

BATCHES = [
    [(1500, 1), (700, 1), (1, 1), (257, 1), (64, 1)],
    [(900, 900), (300, 70)],
    [(1300, 1), (500, 130), (40, 40), (2000, 1), (513, 257)],
    [(4000, 1)],
]


def variants(softcap: bool, sinks: bool) -> Iterator[tuple[LayerSpec, Pattern, torch.dtype]]:
    """Layers, patterns and dtypes; the most common first."""
    for (query_heads, kv_heads, size), window, dtype in itertools.product(
        ((8, 2, 128), (9, 3, 64), (4, 4, 64)), (None, 100, 1000), (torch.bfloat16, torch.float16)
    ):
        layer = LayerSpec(0, query_heads, kv_heads, size, size, size**-0.5, window=window)
        yield layer, Full(), dtype
    yield LayerSpec(0, 8, 2, 128, 128, 0.1), SlidingWindow(300, 0), torch.bfloat16
    if softcap:
        yield LayerSpec(0, 8, 2, 128, 128, 0.1, softcap=20.0), Full(), torch.bfloat16
    if sinks:
        yield LayerSpec(0, 8, 2, 64, 64, 0.1, window=128, sinks=True), Full(), torch.bfloat16
        yield LayerSpec(0, 8, 2, 64, 64, 0.1, sinks=True), Full(), torch.bfloat16


def difference(
    kernel: Kernel,
    layer: LayerSpec,
    pattern: Pattern,
    dtype: torch.dtype,
    page_size: int,
    batch: list[tuple[int, int]],
) -> float:
    """The largest difference to ``Reference``, in units of the dtype's tolerance; 1 is too much."""
    case = make_case(layer, batch, page_size, pattern=pattern, dtype=dtype, device="cuda", seed=page_size)
    for pages in (case.cache.keys, case.cache.values):
        # Unwritten memory is finite on a GPU, and wrong.
        pages.nan_to_num_(nan=50.0)
    arguments = (layer, case.query, case.cache, case.batch, pattern, case.sinks)
    expected = attend(Reference(), *arguments).float()
    result = attend(kernel, *arguments).float()
    error = 4 * torch.finfo(dtype).eps
    ratio = (result - expected).abs() / (error + error * expected.abs())
    return float(ratio.nan_to_num(nan=torch.inf).max())


def check(name: str, kernel: Kernel, cases: Iterator[tuple], stop: float) -> bool:
    """Prints the results; whether all are right."""
    done, wrong, refused = 0, 0, []
    for page_size, (layer, pattern, dtype) in cases:
        if time.monotonic() > stop:
            print(f"{name}: out of time, the rest was not tried")
            break
        if found := kernel.unsupported([layer], torch.device("cuda"), dtype, page_size, pattern):
            refused += found
            continue
        for batch in BATCHES:
            found = difference(kernel, layer, pattern, dtype, page_size, batch)
            done += 1
            if found >= 1:
                wrong += 1
                print(
                    f"{name}: {found:.2g} times the error allowed: {layer}, {pattern.name}, {dtype}, {batch}"
                )
    for reason in dict.fromkeys(refused):
        print(f"{name}: refused: {reason}")
    print(f"{name}: {done - wrong} of {done} cases equal Reference")
    return not wrong


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, default=110, help="about how long to try, compiling included"
    )
    seconds = parser.parse_args().seconds
    if not torch.cuda.is_available():
        print("there is no GPU here that this torch can use")
        return 1
    major, minor = torch.cuda.get_device_capability()
    print(f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}, torch {torch.__version__}")
    there = [candidate for candidate in CANDIDATES if is_installed(candidate[1])]
    for name, module, *_ in CANDIDATES:
        if name not in [candidate[0] for candidate in there]:
            print(f"{name}: not checked, {module} is not installed")
    interfaces, good = flash_attn.INTERFACES, True
    start = time.monotonic()
    for position, (name, module, kernel, page_sizes, softcap, sinks) in enumerate(there, 1):
        flash_attn.INTERFACES = tuple(interface for interface in interfaces if interface.module == module)
        cases = itertools.product(page_sizes, variants(softcap, sinks))
        good &= check(name, kernel(), iter(cases), start + seconds * position / len(there))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
