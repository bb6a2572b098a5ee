"""Transfers between the host and a device, with as few waits of the host as possible."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Event

_only = ContextVar("device only", default=False)


class DeviceOnlyError(RuntimeError):
    """A transfer from or to the host where only the device may take part."""


@contextmanager
def device_only() -> Iterator[None]:
    """A context in which ``to_device`` and ``fetch`` raise ``DeviceOnlyError``: they can't be captured."""
    before = _only.set(True)
    try:
        yield
    finally:
        _only.reset(before)


def to_device(numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The numbers on the device; the same tensor, if it is already there.

    The host does not wait. Without pinned memory it would wait until the device has finished all queued work.
    """
    _refuse_if_only("numbers of the host can't be part of a captured step")
    if numbers.device.type == device.type:
        return numbers
    return numbers.pin_memory().to(device, non_blocking=True)


class AsyncCopy:
    """An asynchronous copy of tensors from a device to the host.

    It starts as soon as the device has finished the work queued before it, and does not wait for later work.

    Args:
        tensors: all of one device.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        _refuse_if_only("the host can't read what a captured step computes")
        self._tensors = list(tensors)
        self._arrived: Event | None = None
        if not tensors or tensors[0].device.type == "cpu":
            return
        # Larger dtypes first, so that all are aligned.
        self._order = sorted(range(len(tensors)), key=lambda i: -tensors[i].itemsize)
        parts = [tensors[i].flatten().view(torch.uint8) for i in self._order]
        # With non_blocking, torch copies to pinned memory and does not wait.
        self._bytes = torch.cat(parts).to("cpu", non_blocking=True)
        self._arrived = Event(tensors[0].device)
        self._arrived.record()

    def wait(self) -> list[torch.Tensor]:
        """The tensors on the host, after one wait for all of them."""
        if self._arrived is None:
            return self._tensors
        self._arrived.synchronize()
        sizes = [self._tensors[i].nbytes for i in self._order]
        result = list(self._tensors)
        for i, part in zip(self._order, self._bytes.split(sizes), strict=True):
            result[i] = part.view(result[i].dtype).view(result[i].shape)
        return result


def fetch(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors, all of one device, on the host, after one wait for all of them."""
    return AsyncCopy(tensors).wait()


def _refuse_if_only(reason: str) -> None:
    if _only.get():
        raise DeviceOnlyError(reason)
