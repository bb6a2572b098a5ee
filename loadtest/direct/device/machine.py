"""What the machine itself gives: memory's bandwidth, the rate of matrix products; and how much is in use."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import psutil
import torch

from server.engine.hardware import used_bytes

_WARMUPS = 3


def device_at_hand() -> torch.device:
    """The first CUDA device if torch sees one, else the CPU: as ``--device auto`` chooses."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def memory_bandwidth(device: torch.device, size: int, repeats: int) -> float:
    """Bytes per second between memory and processor: the better of a sum and a copy, median of ``repeats``.

    A sum only reads, as a decode step nearly does; a copy reads and writes, so it counts twice.

    Args:
        device: whose memory.
        size: bytes of each of two buffers; many times the caches.
        repeats: to time.
    """
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    read = size / _median(lambda: source.sum(), device, repeats)
    copied = 2 * size / _median(lambda: target.copy_(source), device, repeats)
    return max(read, copied)


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int, repeats: int) -> float:
    """Additions and multiplications per second in a product of two square matrices, median of ``repeats``.

    Args:
        device: that multiplies.
        dtype: of the matrices. Their numbers are random: zeros take less power, and a GPU then runs faster
            than it will with weights.
        size: rows and columns.
        repeats: to time.
    """
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    output = torch.empty_like(left)
    return 2 * size**3 / _median(lambda: torch.mm(left, right, out=output), device, repeats)


def memory_in_use(device: torch.device) -> int:
    """Bytes in use: on the whole device, by whomever; on the CPU, of this process and its descendants."""
    if device.type == "cuda":
        return used_bytes(device)
    own = psutil.Process()
    return sum(int(process.memory_info().rss) for process in (own, *own.children(recursive=True)))


def _median(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds that ``work`` takes. On CUDA all is queued at once, so that no launch is waited for."""
    for _ in range(_WARMUPS):
        work()
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        events[0].record()
        for event in events[1:]:
            work()
            event.record()
        torch.cuda.synchronize(device)
        return statistics.median(begin.elapsed_time(end) for begin, end in pairwise(events)) / 1e3
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)
