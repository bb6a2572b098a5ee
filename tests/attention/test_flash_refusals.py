"""Refusals of the flash backend's kernels with their reasons, and what they accept."""

from __future__ import annotations

import sys

import pytest
import torch

from attention import LayerSpec
from attention.kernels.flash_attn import FlashAttn
from attention.kernels.sdpa_flash import SdpaFlash
from attention.kernels.varlen import Varlen
from attention.patterns.full import Full
from attention.patterns.longformer import Longformer
from attention.patterns.sliding_window import SlidingWindow
from attention.patterns.topk import TopK
from tests.attention.flash_cases import (
    installed,
    refusals,
)


def test_fa4_is_not_taken_for_fa2():
    with installed("fa4", gpu=(9, 0)):
        assert refusals(FlashAttn(), page_size=16) == []
        assert "flash_attn.cute" in sys.modules
    with installed("fa2", gpu=(9, 0)):
        assert refusals(FlashAttn(), page_size=16) == [
            "FA2 reads pages of a multiple of 256 tokens, not 16; choose page size 256"
        ]


@pytest.mark.parametrize(
    ("names", "gpu", "accepted"),
    [
        (("fa3",), (9, 0), True),
        (("fa3",), (8, 0), False),
        (("fa3",), (10, 0), False),
        (("fa2",), (8, 0), True),
        (("fa2",), (7, 5), False),
        (("fa2",), (12, 0), True),
        (("fa4",), (9, 0), True),
        (("fa4",), (10, 3), True),
        (("fa4",), (8, 0), False),
        (("fa4",), (12, 0), False),
    ],
)
def test_which_gpus(names, gpu, accepted):
    with installed(*names, gpu=gpu):
        found = refusals(FlashAttn())
    assert (found == []) == accepted
    assert accepted or f"this device has {gpu[0]}.{gpu[1]}" in "; ".join(found)


def test_without_the_package():
    with installed():
        assert refusals(FlashAttn(), device=torch.device("cpu"), dtype=torch.float32, page_size=16) == [
            "flash_attn computes on a CUDA device, not on cpu",
            "flash_attn computes in float16 or bfloat16, not float32",
            "flash_attn is not installed; pip install 'longspan[flash]', or build flash-attn from source",
        ]


def test_all_reasons_at_once():
    layers = [LayerSpec(0, 4, 2, 260, 128, 0.1, softcap=5.0, sinks=True), LayerSpec(1, 4, 2, 64, 64, 0.1)]
    with installed("fa2", "fa3", gpu=(8, 6)):
        assert refusals(
            FlashAttn(), layers, dtype=torch.float32, page_size=400, pattern=Longformer(8, 2)
        ) == [
            "flash_attn computes in float16 or bfloat16, not float32",
            "flash_attn cannot compute longformer",
            "flash_attn takes head sizes that are multiples of 8 up to 256, not 260 (layer 0)",
            "flash_attn takes values of the keys' head size only (layer 0)",
            "FA3 reads pages on compute capability 9.x, this device has 8.6",
            "FA3 lacks learned sinks (layer 0)",
            "FA2 reads pages of a multiple of 256 tokens, not 400; choose page size 512",
            "FA2 lacks learned sinks (layer 0)",
        ]
    with installed(gpu=(7, 0)):
        assert refusals(Varlen(), layers, pattern=SlidingWindow(9, 4)) == [
            "varlen needs compute capability 8.0, this device has 7.0",
            "varlen computes sliding_window without sinks only, not with sinks=4",
            "varlen takes head sizes that are multiples of 8 up to 256, not 260 (layer 0)",
            "varlen takes values of the keys' head size only (layer 0)",
            "varlen lacks soft-capping (layer 0)",
            "varlen lacks learned sinks (layer 0)",
        ]
    assert refusals(SdpaFlash(), layers, dtype=torch.float64, pattern=TopK(16, 1, 1)) == [
        "sdpa_flash lacks soft-capping (layer 0)",
        "sdpa_flash lacks learned sinks (layer 0)",
        "sdpa_flash reads float32, bfloat16, float16 or float8_e4m3, not float64",
        "sdpa_flash computes on the CPU, not on cuda",
        "sdpa_flash cannot compute topk",
        "sdpa_flash takes values of the keys' head size only (layer 0)",
    ]


@pytest.mark.parametrize(
    ("gpu", "size", "refused"),
    [
        ((9, 0), 24, "FA4 takes head sizes that are multiples of 16, not 24 (layer 0)"),
        ((10, 0), 24, "FA4 takes head sizes that are multiples of 16 up to 128, or 256, not 24 (layer 0)"),
        ((10, 0), 192, "FA4 takes head sizes that are multiples of 16 up to 128, or 256, not 192 (layer 0)"),
        ((10, 0), 256, None),
        ((9, 0), 192, None),
    ],
)
def test_head_sizes_of_fa4(gpu, size, refused):
    with installed("fa4", gpu=gpu):
        found = refusals(FlashAttn(), [LayerSpec(0, 4, 2, size, size, 0.1)])
    assert found == ([] if refused is None else [refused])


def test_a_package_that_is_broken_or_too_old(tmp_path, monkeypatch):
    (tmp_path / "flash_attn_interface.py").write_text("raise ImportError('undefined symbol: _ZN3c10')\n")
    folder = tmp_path / "flash_attn" / "cute"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("def flash_attn_varlen_func(q, k, v): ...\n")
    with installed(gpu=(9, 0)):
        monkeypatch.syspath_prepend(tmp_path)
        assert refusals(FlashAttn()) == [
            "FA3 is installed but cannot be imported: ImportError: undefined symbol: _ZN3c10",
            "FA4 is too old to read pages; pip install --upgrade 'longspan[flash]'",
        ]


@pytest.mark.parametrize(
    ("pattern", "accepted"),
    [
        (Full(), True),
        (SlidingWindow(100, 0), True),
        (SlidingWindow(100, 0, positions="cache"), True),
        (SlidingWindow(100, 4), False),
        (Longformer(100, 0), False),
        (TopK(16, 1, 1), False),
    ],
)
def test_patterns(pattern, accepted):
    with installed("fa3", gpu=(9, 0)):
        assert (refusals(FlashAttn(), pattern=pattern) == []) == accepted
        assert (refusals(Varlen(), pattern=pattern) == []) == accepted
