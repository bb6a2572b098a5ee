"""The device at hand, and how much of its memory is in use."""

from __future__ import annotations

import psutil
import torch

from server.engine.hardware import used_bytes


def device_at_hand() -> torch.device:
    """The first CUDA device if torch sees one, else the CPU: like ``--device auto``."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """The device's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def memory_in_use(device: torch.device) -> int:
    """Bytes in use: of a GPU by all processes; of the CPU's memory by this process and its descendants."""
    if device.type == "cuda":
        return used_bytes(device)
    own = psutil.Process()
    return sum(int(process.memory_info().rss) for process in (own, *own.children(recursive=True)))
