"""The properties of a device by which Triton programs are cut."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

# Data center GPUs have at least this for each multiprocessor; the others have 100 KiB.
LARGE_SHARED_MEMORY = 160 << 10


class Device(NamedTuple):
    """Properties of a device.

    Attributes:
        processors: number of multiprocessors.
        shared_memory: bytes of each.
        capability: compute capability.
    """

    processors: int
    shared_memory: int
    capability: tuple[int, int]


# Assumed for Triton's interpreter, which has no device.
INTERPRETED = Device(8, LARGE_SHARED_MEMORY, (9, 0))


@cache
def device_of(device: torch.device) -> Device:
    """The properties of a torch device."""
    if device.type != "cuda":
        return INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    return Device(
        int(properties.multi_processor_count),
        int(properties.shared_memory_per_multiprocessor),
        torch.cuda.get_device_capability(device),
    )
