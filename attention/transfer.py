"""Numbers between the host and a device, with as few waits of the host for the device as can be."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def send(numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The numbers on the device; themselves, if they are there already.

    The host goes on at once. From memory that is not pinned it would first have to wait until the device has
    done all that is queued.
    """
    if numbers.device.type == device.type:
        return numbers
    return numbers.pin_memory().to(device, non_blocking=True)


def fetch(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors, all of one device, on the host, after one wait for all of them."""
    if len(tensors) < 2 or tensors[0].device.type == "cpu":
        return [tensor.cpu() for tensor in tensors]
    # Larger numbers first, so that each lie where numbers of their size may.
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].itemsize)
    parts = [tensors[i].flatten().view(torch.uint8) for i in order]
    found = torch.cat(parts).cpu().split([len(part) for part in parts])
    result = list(tensors)
    for i, part in zip(order, found, strict=True):
        result[i] = part.view(tensors[i].dtype).view(tensors[i].shape)
    return result
