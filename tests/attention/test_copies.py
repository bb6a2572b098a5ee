"""Plans copy numbers of the host to the device without a wait."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attention import AttentionBatch, LayerSpec
from attention.kernels import varlen
from attention.kernels.base import Kernel, Kind
from attention.kernels.flash_attn import FlashAttn
from attention.kernels.reference import Reference
from attention.kernels.sdpa import Sdpa
from attention.kernels.triton_paged import Triton
from attention.kernels.varlen import Varlen
from attention.patterns.full import Full
from tests.attention.doubles import varlen as varlen_doubles
from tests.attention.flash_cases import installed
from tests.stand_in_device import StandInDevice

LAYER = LayerSpec(0, 4, 2, 64, 64, 0.125)


@pytest.mark.parametrize("window", [None, 10])
@pytest.mark.parametrize(
    "kernel", [FlashAttn(), Varlen(), Sdpa(), Triton(), Reference()], ids=lambda k: k.name
)
def test_a_plan_waits_for_nothing(kernel: Kernel, window: int | None, monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", varlen_doubles.in_2_11)
    layers = Kind(replace(LAYER, window=window), Full(), torch.float16, torch.float16)
    for interface in ("fa2", "fa3"):
        with installed(interface), StandInDevice() as device:
            batch = AttentionBatch.build([29, 10], [1, 5], [[1, 2], [3]], 256, device.device)
            assert device.sent.total() == 2  # rows and the page table
            kernel.plan(layers, batch)
            assert not device.reads
            assert not device.copies
            assert device.sent.total() > 2
