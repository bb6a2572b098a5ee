"""Prints what the engine tells of compiling while Triton compiles a kernel for a GPU that is not there."""

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


if __name__ == "__main__":
    driver.set_active(stand_in())
    told = []
    tell_of_compiling(told.append)
    for size in (16, 16, 32):
        kernel.warmup(torch.float32, size=size, grid=(1,))
        print(told)
