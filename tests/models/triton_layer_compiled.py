"""The programs of a decoder layer, and of the write to the cache, compiled for GPUs; this needs no GPU.

It needs a Triton that is not set to interpret, so ``test_triton_layer`` runs this file in a process of its
own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from attention.kernels import triton_write, triton_write_code
from attention.types import LayerCache
from server.models.fused import Norm
from server.models.gpu import layer as gpu
from server.models.gpu import layer_code
from tests.attention.triton_compiled import SHARED, Recorder, compiled, stack

Launches = list[tuple[Any, dict[str, Any]]]


class Heads:
    """What ``_rotate`` wants to know of a layer."""

    def __init__(self, query_heads: int, kv_heads: int, head_size: int, norms: list[Norm]) -> None:
        self.query_heads, self.kv_heads, self.head_size = query_heads, kv_heads, head_size
        self.head_norms = norms


def norm_of(size: int, dtype: torch.dtype) -> Norm:
    return Norm(nn.RMSNorm(size, 1e-5, dtype=dtype))


def normalizing(size: int, dtype: torch.dtype) -> None:
    gpu._normed(torch.empty(3, size, dtype=dtype), norm_of(size, dtype))


def rotating(query_heads: int, kv_heads: int, size: int, normed: bool, dtype: torch.dtype) -> None:
    norms = [norm_of(size, dtype), norm_of(size, dtype)] if normed else []
    rows = torch.empty(3, (query_heads + 2 * kv_heads) * size, dtype=dtype)
    angles = torch.empty(1, 3, size, dtype=dtype)
    gpu._rotate(rows, Heads(query_heads, kv_heads, size, norms), angles, angles)


def gating(size: int, activation: nn.Module, dtype: torch.dtype) -> None:
    gpu._gated(torch.empty(3, 2 * size, dtype=dtype), activation)


def writing(heads: int, size: int, value_size: int, dtype: torch.dtype, cached: torch.dtype) -> None:
    pages = [torch.empty(4, 16, heads, number, dtype=cached) for number in (size, value_size)]
    rows = torch.empty(3, 4 * heads, max(size, value_size), dtype=dtype)
    key, value = rows[:, :heads, :size], rows[:, heads : 2 * heads, :value_size]
    triton_write.write(LayerCache(*pages), torch.zeros(3, dtype=torch.int64), key, value)


def recorded(call: Callable[[], None]) -> tuple[Any, dict[str, Any]]:
    """The one launch of a call."""
    found: Launches = []

    class Code:
        norm, rotate, gate = (
            Recorder(found, program) for program in (layer_code.norm, layer_code.rotate, layer_code.gate)
        )
        write = Recorder(found, triton_write_code.write)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "_code", lambda: Code)
        patch.setattr(triton_write, "_code", lambda: Code)
        call()
    (launch,) = found
    return launch


GELU = type("GELUTanh", (nn.Module,), {})()
BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn

# With the instructions of 16 bytes that they read and write by, where the sizes of Llama allow.
CALLS = {
    "norm of 4096": (lambda: normalizing(4096, BF16), {"ld.global.v4.b32", "st.global.v4.b32"}),
    "norm of 960": (lambda: normalizing(960, FP16), set()),
    "norm of 1": (lambda: normalizing(1, FP32), set()),
    "rotate": (lambda: rotating(32, 8, 128, False, BF16), {"ld.global.v4.b32", "st.global.v4.b32"}),
    "rotate and norm": (lambda: rotating(14, 2, 80, True, FP16), set()),
    "rotate and norm in float32": (lambda: rotating(9, 3, 64, True, FP32), set()),
    "gate": (lambda: gating(14336, nn.SiLU(), BF16), {"ld.global.v4.b32", "st.global.v4.b32"}),
    "gate with gelu": (lambda: gating(1100, GELU, FP32), set()),
    "write": (lambda: writing(8, 128, 128, BF16, BF16), {"ld.global.v4.b32", "st.global.v4.b32"}),
    "write to 8 bits": (lambda: writing(8, 128, 128, BF16, FP8), {"ld.global.v4.b32", "st.global.v2.b32"}),
    "write to float16": (lambda: writing(3, 80, 64, FP32, FP16), set()),
    "write to bfloat16": (lambda: writing(3, 192, 128, FP16, BF16), set()),
}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", CALLS)
def test_programs_compile_and_fit(name, capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    call, wide = CALLS[name]
    program, arguments = recorded(call)
    result = compiled(program, arguments, capability)
    assert result.metadata.shared <= SHARED[capability][1] << 10
    assert stack(result.asm["cubin"], tmp_path) == 0
    instructions = re.findall(r"\b(?:ld|st)\.global[.\w]*|\bbar[.\w]*sync", result.asm["ptx"])
    assert wide <= set(instructions)
    if program is layer_code.rotate:
        # All of a tile is read before any of it is written.
        before, _, after = "".join(name[0] for name in instructions).partition("s")
        assert before.endswith("b")
        assert "l" not in after
