"""The limits of this processor: ``python -m loadtest.direct.limits``.

Products per second from registers and bytes read per second, at the level of native code in force, for one
thread and for all. A kernel's rate is stated as a share of these. A product that is added to a sum counts as
two operations.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from attention.kernels.cpu import levels, native

_SOURCE = Path(__file__).with_name("limits.cpp")
_KINDS = ("8-bit integers", "bfloat16", "float32")
_ROUNDS = 10_000_000
_BYTES = 256 << 20  # per thread, far more than caches have
_REPEATS = 7


def rates(work: Callable[[int], int], threads: int, repeats: int = _REPEATS) -> list[float]:
    """Amounts per second of all threads together, once for each repeat.

    Args:
        work: done by each thread, which gets its number; gives the amount.
        threads: that do it at the same time, without the interpreter's lock.
        repeats: of the whole.
    """
    found = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            begin = time.perf_counter()
            amount = sum(pool.map(work, range(threads)))
            found.append(amount / (time.perf_counter() - begin))
    return found


def limits(threads: int, repeats: int = _REPEATS, scale: float = 1.0) -> dict[str, float]:
    """Operations and bytes per second, the best of some repeats; 0 for what the level has no instruction for.

    Args:
        threads: at the same time.
        repeats: of each.
        scale: of the work of one repeat.

    Raises:
        NativeError: the code cannot be compiled here.
    """
    library = native.load(_SOURCE, native.kept())
    library.longspan_multiply.restype = library.longspan_read.restype = ctypes.c_int64
    library.longspan_multiply.argtypes = [ctypes.c_int64, ctypes.c_int64]
    library.longspan_read.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    rounds = int(_ROUNDS * scale)
    found = {}
    for kind, name in enumerate(_KINDS):

        def multiply(thread: int, kind: int = kind) -> int:
            return int(library.longspan_multiply(kind, rounds))

        found[f"{name}, operations/s"] = max(rates(multiply, threads, repeats))
    memory = [np.ones(int(_BYTES * scale), dtype=np.uint8) for _ in range(threads)]

    def read(thread: int) -> int:
        library.longspan_read(memory[thread].ctypes.data, memory[thread].nbytes)
        return memory[thread].nbytes

    return found | {"reading, bytes/s": max(rates(read, threads, repeats))}


def main() -> int:
    """Prints one line for each limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--native-level", default=levels.AUTO, help="of native code (default %(default)s)")
    arguments = parser.parse_args()
    most = len(os.sched_getaffinity(0))
    try:
        level = levels.use(arguments.native_level)
        one, all_of_them = limits(1), limits(most)
    except levels.LevelError as error:
        parser.error(f"--native-level: {error}")
    except native.NativeError as error:
        parser.exit(1, f"the limits cannot be measured: {error}\n")
    print(f"level {level.name}, in billions; one thread and {most}")
    for name, rate in one.items():
        print(f"{name:32} {rate / 1e9:8.1f} {all_of_them[name] / 1e9:8.1f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
