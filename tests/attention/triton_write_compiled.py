"""The write to the paged cache compiled for GPUs; this needs no GPU.

It needs a Triton that is not set to interpret, so ``test_triton`` runs this file in a process of its own.
"""

from __future__ import annotations

import re

import pytest
import torch

from attention.kernels import triton_write, triton_write_code
from attention.types import LayerCache
from tests.attention.triton_compiled import SHARED, Recorder, compiled, stack

BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn

# Heads, sizes of a key and of a value, dtypes of the new numbers and of the cache; and the instructions of
# 16 bytes that it reads and writes by, where the sizes of Llama allow.
CALLS = {
    "as it is": ((8, 128, 128, BF16, BF16), {"ld.global.v4.b32", "st.global.v4.b32"}),
    "to 8 bits": ((8, 128, 128, BF16, FP8), {"ld.global.v4.b32", "st.global.v2.b32"}),
    "to float16": ((3, 80, 64, FP32, FP16), set()),
    "to bfloat16": ((3, 192, 128, FP16, BF16), set()),
}


def writing(heads: int, size: int, value_size: int, dtype: torch.dtype, cached: torch.dtype) -> None:
    pages = [torch.empty(4, 16, heads, number, dtype=cached) for number in (size, value_size)]
    rows = torch.empty(3, 4 * heads, max(size, value_size), dtype=dtype)
    key, value = rows[:, :heads, :size], rows[:, heads : 2 * heads, :value_size]
    triton_write.write(LayerCache(*pages), torch.zeros(3, dtype=torch.int64), key, value)


@pytest.mark.parametrize(
    ("name", "capability"),
    [("as it is", 90), ("to 8 bits", 80), ("to 8 bits", 90), ("to float16", 80), ("to bfloat16", 90)],
)
def test_the_program_compiles_and_fits(name, capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = []

    class Code:
        write = Recorder(found, triton_write_code.write)

    monkeypatch.setattr(triton_write, "_code", lambda: Code)
    arguments, wide = CALLS[name]
    writing(*arguments)
    ((program, launched),) = found
    result = compiled(program, launched, capability)
    assert result.metadata.shared <= SHARED[capability][1] << 10
    assert stack(result.asm["cubin"], tmp_path) == 0
    assert wide <= set(re.findall(r"\b(?:ld|st)\.global[.\w]*", result.asm["ptx"]))
