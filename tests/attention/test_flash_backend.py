"""Which kernels the flash backend and ``auto`` take, and torch's flash attention for a CPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import LayerSpec, UnsupportedError, resolve
from attention.kernels.cpu.native import NativeError
from attention.kernels.reference import Reference
from attention.kernels.sdpa_flash import SdpaFlash
from attention.patterns.full import Full
from tests.attention.cases import make_case
from tests.attention.flash_cases import (
    DOUBLES,
    GPU,
    PLAIN,
    compute,
    installed,
    layers,
    seeds,
    shapes,
)


@settings(max_examples=12, deadline=None)
@given(
    layers(softcap=False), shapes, st.integers(1, 32), st.sampled_from([torch.float32, torch.bfloat16]), seeds
)
def test_sdpa_flash_equals_reference(layer, shapes, page_size, dtype, seed):
    case = make_case(layer, shapes, page_size, dtype=dtype, seed=seed)
    error = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        compute(SdpaFlash(), case, Full()), compute(Reference(), case, Full()), rtol=error, atol=error
    )


def test_sdpa_flash_fails_where_torch_would_compute_in_another_way():
    case = make_case(LayerSpec(0, 2, 1, 16, 8, 0.25), [(40, 1)], 16)
    with pytest.raises(RuntimeError, match="No available kernel"):
        compute(SdpaFlash(), case, Full())


def test_the_backend_on_a_cpu_reads_pages_in_place(monkeypatch):
    attention = resolve("flash", {}, "auto", PLAIN, "cpu", torch.float32, 16)
    assert (attention.backend, attention.pattern.name, attention.kernel.name) == (
        "flash",
        "full",
        "cpu_paged",
    )
    assert resolve("flash", {}, "sdpa_flash", PLAIN, "cpu", torch.float32, 16).kernel.name == "sdpa_flash"

    def missing():
        raise NativeError("no compiler")

    monkeypatch.setattr("attention.kernels.cpu.paged.compiled", missing)
    attention = resolve("flash", {}, "auto", PLAIN, "cpu", torch.float32, 16)
    assert attention.kernel.name == "sdpa_flash"
    assert "cpu_paged cannot be compiled here: no compiler" in attention.reason


def test_the_backend_with_a_package():
    with installed("fa3", gpu=(9, 0)):
        attention = resolve("flash", {}, "auto", PLAIN, GPU, torch.bfloat16, 16)
        assert attention.kernel.name == "flash_attn"
    with installed(gpu=(9, 0)):
        attention = resolve("flash", {}, "auto", PLAIN, GPU, torch.bfloat16, 16)
        assert attention.kernel.name == "varlen"
    with installed("fa2", gpu=(8, 0)), pytest.raises(UnsupportedError, match="choose page size 256"):
        resolve("flash", {}, "flash_attn", PLAIN, GPU, torch.bfloat16, 16)


@pytest.mark.parametrize("backend", ["full", "sliding_window", "sparse"])
def test_on_a_gpu_kernels_that_read_pages_in_place_come_before_those_that_gather(backend, monkeypatch):
    options = {"full": {}, "sliding_window": {"sinks": "0"}, "sparse": {"pattern": "longformer"}}[backend]

    def taken(dtype: torch.dtype = torch.bfloat16) -> str:
        return resolve(backend, options, "auto", PLAIN, GPU, dtype, 16).kernel.name

    with installed("fa3", gpu=(9, 0)):
        assert taken() == ("triton" if backend == "sparse" else "flash_attn")
        assert taken(torch.float32) == "triton"
    with installed("fa2", gpu=(8, 0)):  # which needs pages of 256 tokens
        assert taken() == "triton"
    with installed(gpu=(7, 5)):
        assert taken() == "sdpa"
    with installed(gpu=(9, 0)):
        monkeypatch.setattr("attention.kernels.triton_paged.find_spec", lambda name: None)
        assert taken() == "sdpa"


def test_packages_are_imported_only_when_used():
    script = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "import attention, torch\n"
        "layers = [attention.LayerSpec(0, 4, 2, 64, 64, 0.125)]\n"
        "attention.resolve('full', {}, 'auto', layers, 'cpu', torch.float32, 16)\n"
        "attention.resolve('flash', {}, 'auto', layers, 'cpu', torch.float32, 16)\n"
        "try: attention.resolve('xformers', {}, 'auto', layers, 'cpu', torch.float32, 16)\n"
        "except attention.UnsupportedError: pass\n"
        "print([name for name in sys.modules if name.split('.')[0] in"
        " ('flash_attn', 'flash_attn_interface', 'xformers')])\n"
    )
    folders = [str(DOUBLES / name) for name in ("fa2", "fa3")]
    run = subprocess.run([sys.executable, "-c", script, *folders], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
