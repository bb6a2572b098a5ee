"""Products with weights of 8 bits compiled for GPUs, down to machine code; this needs no GPU.

It needs a Triton that is not set to interpret, so ``test_eight_bit`` runs this file in a process of its own.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from attention.kernels.triton_device import Device
from server.models.gpu import linear as module
from server.models.gpu import linear_code
from server.models.gpu.linear import EightBitLinear
from tests.attention.triton_compiled import SHARED, Recorder, compiled, stack


def launches(
    capability: int, form: str, dtype: torch.dtype, rows: int, inputs: int, outputs: int
) -> list[tuple[Any, dict[str, Any]]]:
    """What a product with bias launches on a GPU, or in ``fp8`` a product that is added."""
    found: list[tuple[Any, dict[str, Any]]] = []

    class Code:
        multiply_few = Recorder(found, linear_code.multiply_few)
        multiply_many = Recorder(found, linear_code.multiply_many)
        combine = Recorder(found, linear_code.combine)

    plain = nn.Linear(inputs, outputs, bias=form == "int8", dtype=dtype)
    packed = EightBitLinear(plain, form)
    device = Device(132, SHARED[capability][0] << 10, divmod(capability, 10))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_code", lambda: Code)
        patch.setattr(module, "device_of", lambda _: device)
        x = torch.zeros(rows, inputs, dtype=dtype)
        if form == "int8":
            packed(x)
        else:
            packed.add_to(torch.zeros(rows, outputs, dtype=dtype), x)
    return found


FEW, MANY, SPLIT = ["multiply_few"], ["multiply_many"], ["multiply_many", "combine"]


@pytest.mark.parametrize(
    ("capability", "form", "dtype", "rows", "inputs", "outputs", "programs"),
    [
        (90, "int8", torch.bfloat16, 1, 1024, 1024, FEW),
        (90, "fp8", torch.bfloat16, 16, 512, 8192, FEW),
        (90, "int8", torch.bfloat16, 64, 1024, 1024, SPLIT),
        (90, "fp8", torch.bfloat16, 512, 512, 1024, MANY),
        (89, "fp8", torch.float16, 1, 576, 200, FEW),
        (89, "int8", torch.float32, 40, 576, 200, MANY),
        (80, "int8", torch.bfloat16, 1, 1024, 1024, FEW),
        (80, "fp8", torch.bfloat16, 300, 320, 200, MANY),
    ],
)
def test_programs_compile_and_fit(
    capability, form, dtype, rows, inputs, outputs, programs, tmp_path, monkeypatch
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = launches(capability, form, dtype, rows, inputs, outputs)
    assert [program.__name__ for program, _ in found] == programs
    for program, arguments in found:
        result = compiled(program, arguments, capability)
        assert result.metadata.shared <= SHARED[capability][1] << 10
        assert stack(result.asm["cubin"], tmp_path) <= 64
        if program is linear_code.combine:
            continue
        ptx = result.asm["ptx"]
        # Codes and rows of later tiles are on their way while one is multiplied, codes 16 bytes at a time.
        assert result.asm["ttgir"].count("ttg.async_copy_global_to_local") >= 4
        assert re.search(r"cp\.async\.cg\.shared\.global \[.*\], \[.*\], 0x10", ptx)
        if dtype != torch.float32:
            assert re.search(r"\bwgmma|\bmma\.sync", ptx)
            assert ("wgmma" in ptx) == (capability == 90 and rows > 16)
        if form == "fp8":
            assert ("cvt.rn.f16x2.e4m3x2" in ptx) == (capability >= 89)
