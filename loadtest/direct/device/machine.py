"""What the machine itself gives: memory's bandwidth, the rate of matrix products; and how much is in use."""

from __future__ import annotations

from typing import cast

import psutil
import torch

from server.engine.hardware import measure_device, used_bytes
from server.messages import Measured


def device_at_hand() -> torch.device:
    """The first CUDA device if torch sees one, else the CPU: as ``--device auto`` chooses."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def limits(device: torch.device, dtype: torch.dtype, buffer: int, repeats: int) -> Measured:
    """What the device can do at best, see ``server.engine.hardware.measure_device``, in one go.

    A server measures the same in slices while it is at rest; here is more time, and on a GPU more free
    memory.
    """
    slices = measure_device(device, dtype, buffer, repeats)
    while True:
        try:
            next(slices)
        except StopIteration as end:
            return cast(Measured, end.value)


def memory_in_use(device: torch.device) -> int:
    """Bytes in use: on the whole device, by whomever; on the CPU, of this process and its descendants."""
    if device.type == "cuda":
        return used_bytes(device)
    own = psutil.Process()
    return sum(int(process.memory_info().rss) for process in (own, *own.children(recursive=True)))
