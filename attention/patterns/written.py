"""The tokens that a step has written to a layer's pages, for patterns that keep page summaries."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from attention.step import DeviceBatch, StepBatch
from attention.transfer import to_device

# Most decode steps complete no page. Made once, since making it takes longer than finding that out.
_NO_PAGES = torch.empty(0, dtype=torch.long)


class Written(NamedTuple):
    """The tokens of a step, once their keys and values are written. The same for all layers.

    Attributes:
        batch: the step; a token's key lies at its slot.
        pages: int64 ``[N]`` on the device, the pages that the step completes; in a captured step, the page of
            each token, complete or not.
        summaries: int64 ``[N]`` on the device, where the pages' summaries go: by the page itself, or by 0,
            which is no sequence's page, for those that are not complete.
    """

    batch: DeviceBatch
    pages: torch.Tensor
    summaries: torch.Tensor

    @classmethod
    def known(cls, host: StepBatch, device: DeviceBatch) -> Written:
        """The tokens of a step that the host knows."""
        # An array, since for so few numbers calling torch costs more than the computation.
        last = np.flatnonzero((host.positions + 1) % host.page_size == 0)
        slots = device.slots
        if len(last):
            pages = slots[to_device(torch.from_numpy(last), slots.device)] // host.page_size
        else:
            pages = _NO_PAGES if slots.device == _NO_PAGES.device else slots[:0]
        return cls(device, pages, pages)

    @classmethod
    def captured(cls, device: DeviceBatch) -> Written:
        """The tokens of a step that only the device knows."""
        own = device.slots // device.page_size
        completes = (device.positions + 1) % device.page_size == 0
        return cls(device, own, own.where(completes, 0))
