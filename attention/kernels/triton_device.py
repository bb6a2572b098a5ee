"""What Triton programs are cut by: the device that they run on."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

# What data center GPUs have for each multiprocessor; the others have 100 KiB.
LARGE_SHARED_MEMORY = 160 << 10


class Device(NamedTuple):
    """What is known of a device.

    Attributes:
        processors: number of multiprocessors.
        shared_memory: bytes of each.
        capability: compute capability.
    """

    processors: int
    shared_memory: int
    capability: tuple[int, int]


# What is taken for a device where there is none, with Triton's interpreter.
INTERPRETED = Device(8, LARGE_SHARED_MEMORY, (9, 0))


@cache
def device_of(device: torch.device) -> Device:
    """What is known of a device of torch's."""
    if device.type != "cuda":
        return INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    return Device(
        int(properties.multi_processor_count),
        int(properties.shared_memory_per_multiprocessor),
        torch.cuda.get_device_capability(device),
    )
