"""The device's bandwidth and matrix rate, measured, and how much of its memory is in use."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from attention.step import Array
from server.messages import Measured
from server.models.memory import available_bytes
from server.models.quantized.linear import QuantizedLinear
from server.models.quantized.native import Stage, run
from server.models.quantized.packing import Bits, pack

# Of a buffer this many times as large as the last cache, all but some percent is read from memory.
_CACHES = 4
# On an accelerator the most; that is many times its cache.
_LEAST_BUFFER, _MOST_BUFFER = 64 << 20, 512 << 20
_COLUMNS = 4096
_REPEATS = 4

# Products grow until one takes so long that its launch does not count, or has this many rows.
_ENOUGH_SECONDS = 0.002
_LEAST_ROWS, _MOST_ROWS = 128, 8192
_PACKED_SIZE = 1024

_CPUS = Path("/sys/devices/system/cpu")
_USUAL_CACHE = 32 << 20

# Seconds: drivers answer slowly, and metrics are scraped less often.
_MEMORY_SECONDS = 0.5

# Multiplies with this number of rows and returns the number of multiply-adds.
Multiply = Callable[[int], int]


def measure(model: Any) -> Measured:
    """Measures the device that a model is on, see ``measure_device``.

    Where products with weights packed as the model's are faster than those in its dtype, theirs is
    the matrix rate: the most that its linear layers could reach.

    Args:
        model: a language model.

    Raises:
        RuntimeError: there is not enough free memory; the message says how much would do.
    """
    device, dtype = next((p.device, p.dtype) for p in model.parameters() if p.is_floating_point())
    found = measure_device(device, dtype)
    for bits in {module.bits for module in model.modules() if isinstance(module, QuantizedLinear)}:
        rate = _rate(_packed(bits), device, _REPEATS)
        found = Measured(found.bandwidth, max(found.matrix_rate, rate))
    return found


def measure_device(
    device: torch.device, dtype: torch.dtype, buffer: int = _MOST_BUFFER, repeats: int = _REPEATS
) -> Measured:
    """Measures a device's bandwidth and matrix rate, in some tenths of a second.

    Everything is done several times and the best counts: a disturbance makes a measurement slower, never
    faster. The memory is free again afterwards.

    - Memory bandwidth is that of reading a buffer much larger than the last cache: its sum, or its product
      with a vector, whichever is faster.
    - The matrix rate is that of a large product of square matrices.

    On a CPU it uses the threads that torch has.

    Args:
        device: to measure.
        dtype: of the matrices.
        buffer: its bytes; on a CPU at most, where four times the last cache is enough.
        repeats: of each measurement.

    Raises:
        RuntimeError: there is not enough free memory; the message says how much would do.
    """
    try:
        bandwidth = _bandwidth(device, buffer, repeats)
        return Measured(bandwidth, _rate(_square(device, dtype), device, repeats))
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the buffer must not count as memory in use from now on


def memory_bytes(device: torch.device) -> int:
    """All of the device's memory; of the machine, where it is the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return int(psutil.virtual_memory().total)


def used_bytes(device: torch.device) -> int:
    """Memory in use: on an accelerator by all processes, on the CPU what this process holds (its RSS)."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(total - free)
    return int(psutil.Process().memory_info().rss)


class MemoryMeter:
    """Memory in use, looked up at most twice a second."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._looked_at = float("-inf")
        self._used = 0

    def used(self, now: float) -> int:
        """Bytes in use at about ``now``, a monotonic time."""
        if now - self._looked_at >= _MEMORY_SECONDS:
            self._used, self._looked_at = used_bytes(self._device), now
        return self._used


def last_cache_bytes(cpus: Path = _CPUS) -> int:
    """Size of the processors' last cache before memory, all parts of it together.

    Args:
        cpus: where Linux describes processors. Without it a usual size is taken.
    """
    sizes: dict[str, int] = {}
    for folder in cpus.glob("cpu[0-9]*/cache/index3"):
        try:
            size = (folder / "size").read_text().strip()
            shared = (folder / "shared_cpu_list").read_text()
            sizes[shared] = int(size.removesuffix("K")) << 10
        except (OSError, ValueError):
            continue
    return sum(sizes.values()) or _USUAL_CACHE


def _bandwidth(device: torch.device, size: int, repeats: int) -> float:
    """Bytes read per second."""
    if device.type == "cpu":
        size = min(max(_CACHES * last_cache_bytes(), _LEAST_BUFFER), size)
    if available_bytes(device) < 2 * size:
        raise RuntimeError(f"reading from memory takes {2 * size >> 20} MiB of free memory for a moment")
    buffer = torch.ones(size // 4, device=device)
    matrix, vector = buffer[: size // 4 // _COLUMNS * _COLUMNS].view(-1, _COLUMNS), buffer[:_COLUMNS]
    reads: list[Callable[[], object]] = [buffer.view(torch.int64).sum, lambda: matrix @ vector]
    # The first time warms up, and is not the best.
    return max(size / _seconds(read, device) for read in reads * (1 + repeats))


def _rate(multiply: Multiply, device: torch.device, repeats: int) -> float:
    """Operations per second, two to a multiply-add, of the best of ever larger products."""
    best, rows = 0.0, _LEAST_ROWS
    while True:
        products = multiply(rows)  # warms up
        fastest = min(_seconds(partial(multiply, rows), device) for _ in range(repeats))
        best = max(best, 2 * products / fastest)
        if fastest >= _ENOUGH_SECONDS or rows >= _MOST_ROWS:
            return best
        rows *= 2


def _square(device: torch.device, dtype: torch.dtype) -> Multiply:
    made: dict[int, torch.Tensor] = {}

    def multiply(rows: int) -> int:
        if rows not in made:
            made.clear()
            made[rows] = _numbers(rows, rows, device=device, dtype=dtype)
        torch.mm(made[rows], made[rows])
        return rows**3

    return multiply


def _packed(bits: Bits) -> Multiply:
    weight = _numbers(_PACKED_SIZE, _PACKED_SIZE)
    linear = QuantizedLinear(pack(weight, bits), _PACKED_SIZE, _PACKED_SIZE, None)
    made: dict[int, tuple[torch.Tensor, torch.Tensor, Array]] = {}

    def multiply(rows: int) -> int:
        if rows not in made:
            made.clear()
            x = _numbers(rows, _PACKED_SIZE)
            # Of prompts, which a matrix unit multiplies.
            made[rows] = x, torch.empty_like(x), np.ones(rows, dtype=bool)
        x, output, given = made[rows]
        run((Stage * 1)(linear.stage(input=x.data_ptr(), output=output.data_ptr())), rows, given)
        return rows * _PACKED_SIZE**2

    return multiply


def _numbers(
    rows: int, columns: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    # A GPU multiplies equal numbers faster, since they take less power.
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(rows, columns, generator=generator, device=device, dtype=dtype)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        work()  # while it runs the rest is queued, so that the time has no launch in it
        begin.record()
        work()
        end.record()
        end.synchronize()
        return max(begin.elapsed_time(end) / 1e3, 1e-9)
    began = time.perf_counter()
    work()
    return max(time.perf_counter() - began, 1e-9)
