"""What the engine tells while Triton compiles a kernel for a GPU that is not there.

``tests/attention/test_triton.py`` runs this file in a process of its own.
"""

from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from server.engine.compiling import tell_of_compiling


@triton.jit
def kernel(x, size: tl.constexpr):
    tl.store(x + tl.arange(0, size), tl.zeros([size], tl.float32))


def stand_in() -> SimpleNamespace:
    """A driver that knows what to compile for, and has no device."""
    return SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )


def test_real_compilations_are_told_of_and_kept_kernels_are_not(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    driver.set_active(stand_in())
    told = []
    tell_of_compiling(told.append)
    for size, expected in ((16, [True, False]), (16, [True, False]), (32, [True, False, True, False])):
        kernel.warmup(torch.float32, size=size, grid=(1,))
        assert told == expected
