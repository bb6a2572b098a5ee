"""Cases for the kernels of the flash backend, and packages of flash-attn that are installed for a moment."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st

from attention import LayerSpec
from attention.kernels.base import Kernel
from attention.kernels.reference import Reference
from attention.patterns.base import Pattern
from attention.patterns.full import Full
from attention.patterns.sliding_window import SlidingWindow
from tests.attention.cases import Case, attend, sequences

DOUBLES = Path(__file__).parent / "doubles"
PACKAGES = ("flash_attn", "flash_attn.cute", "flash_attn_interface")
GPU = torch.device("cuda", 0)
HALVES = st.sampled_from([torch.bfloat16, torch.float16])
PLAIN = [LayerSpec(i, 4, 2, 64, 64, 0.125) for i in range(4)]


@contextmanager
def installed(*names: str, gpu: tuple[int, int] | None = None) -> Iterator[None]:
    """The doubles of these names and no other flash-attn package, and a GPU of this capability."""
    with pytest.MonkeyPatch.context() as patch:
        for package in PACKAGES:
            patch.delitem(sys.modules, package, raising=False)
        for name in reversed(names):
            patch.syspath_prepend(DOUBLES / name)
        if gpu is not None:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.cuda, "get_device_capability", lambda device=None: gpu)
        yield
        for package in PACKAGES:
            sys.modules.pop(package, None)


@st.composite
def layers(draw: st.DrawFn, sinks: bool = False, softcap: bool = True) -> LayerSpec:
    kv_heads, size = draw(st.integers(1, 3)), draw(st.sampled_from([16, 32]))
    return LayerSpec(
        index=draw(st.integers(0, 3)),
        query_heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_size=size,
        value_size=size,
        scale=draw(st.sampled_from([size**-0.5, 0.07])),
        window=draw(st.none() | st.integers(1, 50) | st.integers(200, 700)),
        softcap=draw(st.none() | st.floats(0.5, 5)) if softcap else None,
        sinks=draw(st.booleans()) if sinks else False,
    )


patterns = st.just(Full()) | st.builds(SlidingWindow, st.integers(1, 300), st.just(0))
shapes = st.one_of(
    sequences(40, 5),
    sequences(700, 3),
    st.lists(st.tuples(st.integers(1, 600), st.just(1)), min_size=1, max_size=4),
)
seeds = st.integers(0, 1 << 30)


def compute(kernel: Kernel, case: Case, pattern: Pattern) -> torch.Tensor:
    return attend(kernel, case.layer, case.query, case.cache, case.batch, pattern, case.sinks)


def equals_reference(kernel: Kernel, case: Case, pattern: Pattern) -> None:
    result = compute(kernel, case, pattern)
    assert result.dtype == case.query.dtype
    # Both compute in float32 and round in the end.
    error = 2 * torch.finfo(case.query.dtype).eps
    torch.testing.assert_close(result, compute(Reference(), case, pattern), rtol=error, atol=error / 16)


def refusals(
    kernel: Kernel,
    layers: list[LayerSpec] = PLAIN,
    *,
    device: torch.device = GPU,
    dtype: torch.dtype = torch.bfloat16,
    page_size: int = 256,
    pattern: Pattern | None = None,
) -> list[str]:
    return kernel.unsupported(layers, device, dtype, page_size, pattern or Full())
