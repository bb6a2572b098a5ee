"""The stand-in device of other tests counts everything that would wait for a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attention.transfer import fetch, to_device
from tests.stand_in_device import StandInDevice

DEVICE = StandInDevice.device

READING = {
    "item": lambda x: x[0].item(),
    "int": lambda x: int(x.sum()),
    "truth": lambda x: bool((x > 1).any()),
    "list": lambda x: x.tolist(),
    "copy": lambda x: x.cpu(),
    "copy into": lambda x: torch.empty(3, dtype=torch.long).copy_(x),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 1),
    "mask": lambda x: x[x > 1],
    "assignment by mask": lambda x: x.__setitem__(x > 1, x[:1]),
    "masked_select": lambda x: torch.masked_select(x, x > 1),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: torch.bincount(x),
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x.float(), x.float()),
    "repeat_interleave": lambda x: torch.repeat_interleave(x),
}

COPYING = {
    "list": lambda x: torch.tensor([1, 2], device=DEVICE),
    "array": lambda x: torch.from_numpy(np.arange(3)).to(DEVICE),
    "not pinned": lambda x: torch.arange(3).to(DEVICE, non_blocking=True),
    "pinned": lambda x: torch.arange(3).pin_memory().to(DEVICE),
    "index": lambda x: x[torch.tensor([0, 2])],
    "index list": lambda x: x[[0, 2]],
    "assignment by list": lambda x: x.__setitem__([0, 2], 1),
    "copy into": lambda x: x.copy_(torch.arange(3)),
}

FREE = {
    "arithmetic": lambda x: (x * 2 + torch.tensor(3)).clamp(min=0).sum(),
    "slice": lambda x: x[1:].view(1, -1)[0],
    "index": lambda x: x[x - 1],
    "factory": lambda x: torch.arange(3, device=x.device) + torch.zeros_like(x),
    "assignment": lambda x: x.__setitem__(1, 7),
    "sort": lambda x: (x.sort().values, x.topk(2), torch.searchsorted(x, x)),
    "repeat_interleave": lambda x: torch.repeat_interleave(x, output_size=6),
    "masked_fill": lambda x: x.masked_fill(x > 1, 0),
    "shape": lambda x: (len(x), x.shape, list(x.unbind())),
}


def noted(work) -> tuple[int, int, int]:
    with StandInDevice() as device:
        numbers = torch.arange(1, 4, device=DEVICE)
        device.forget()
        work(numbers)
        return device.reads.total(), device.copies.total(), device.sent.total()


@pytest.mark.parametrize("work", READING.values(), ids=READING)
def test_reads_of_the_host_are_counted(work):
    assert noted(work) == (1, 0, 0)


@pytest.mark.parametrize("work", COPYING.values(), ids=COPYING)
def test_copies_to_the_host_are_counted(work):
    assert noted(work) == (0, 1, 0)


@pytest.mark.parametrize("work", FREE.values(), ids=FREE)
def test_operators_without_a_wait_are_not_counted(work):
    assert noted(work) == (0, 0, 0)


def test_a_device_refuses_host_tensors():
    with StandInDevice():
        numbers = torch.arange(3, device=DEVICE)
        with pytest.raises(RuntimeError, match="of the device and others"):
            numbers + torch.arange(3)
        with pytest.raises(RuntimeError, match="numpy"):
            numbers.numpy()


def test_numbers_are_copied_to_the_device_without_a_wait():
    numbers = torch.tensor([[1, 2], [3, 4]])
    assert noted(lambda _: to_device(numbers.T, DEVICE)) == (0, 0, 1)
    with StandInDevice():
        there = to_device(numbers.T, DEVICE)
        assert there.device == DEVICE
        assert there.tolist() == [[1, 3], [2, 4]]
        assert to_device(there, DEVICE) is there
    assert to_device(numbers, torch.device("cpu")) is numbers


def test_all_is_fetched_with_one_wait():
    tensors = [
        torch.tensor([True, False, True]),
        torch.tensor([[1.5, -2.0, torch.inf]]).T,
        torch.tensor([2**40, -1]),
        torch.zeros(0, 4, dtype=torch.int64),
        torch.tensor([0.1], dtype=torch.float64),
    ]
    with StandInDevice() as device:
        there = [tensor.to(DEVICE) for tensor in tensors]
        found = fetch(there)
        assert device.reads.total() == 1
    for tensor, again in zip(tensors, found, strict=True):
        assert again.dtype == tensor.dtype
        assert torch.equal(again, tensor)
    assert all(one is other for one, other in zip(fetch(tensors), tensors, strict=True))
    assert fetch([]) == []
