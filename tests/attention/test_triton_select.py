from __future__ import annotations

import torch

from attention import LayerSpec
from attention.kernels import triton_paged, triton_select_check
from attention.kernels.triton_device import Device
from attention.kernels.triton_paged import Triton
from attention.patterns.full import Full
from attention.patterns.topk import TopK
from tests.apart import compile_only, interpret


def test_interpreted():
    interpret("tests/attention/triton_select_interpreted.py")


def test_compiled():
    compile_only("tests/attention/triton_select_compiled.py")


def test_a_gpu_that_chooses_otherwise_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton_paged, "device_of", lambda device: Device(132, 228 << 10, (9, 0)))
    asked = []
    monkeypatch.setattr(
        triton_select_check, "refusals", lambda *given: asked.append(given) or ["it is wrong"]
    )
    layers, pattern = [LayerSpec(0, 4, 2, 64, 64, 0.1)], TopK(64, 1, 1)
    place = torch.device("cuda"), torch.bfloat16, 16
    assert Triton().unsupported(layers, *place, Full()) == []
    assert asked == []
    assert Triton().unsupported(layers, *place, pattern) == ["it is wrong"]
    assert asked == [(pattern, tuple(layers), *place, 132, 32)]
