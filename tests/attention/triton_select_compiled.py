"""The programs that choose, compiled for GPUs down to machine code; this needs no GPU.

It needs a Triton that is not set to interpret, so ``test_triton_select`` runs it in a process of its own.
"""

from __future__ import annotations

import pytest
import torch

from attention import LayerSpec
from attention.patterns.topk import TopK
from tests.attention.triton_compiled import LLAMA, SHARED, compiled, launches, stack


@pytest.mark.parametrize(
    ("capability", "layer", "budget", "dtype"),
    [
        (90, LLAMA, 512, torch.bfloat16),
        (90, LayerSpec(0, 71, 1, 64, 64, 0.125), 512, torch.float8_e4m3fn),
        (80, LayerSpec(0, 8, 8, 512, 512, 0.04, window=1000), 200, torch.float16),
    ],
    ids=["llama", "one key head", "large heads"],
)
def test_programs_compile_and_fit(capability, layer, budget, dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = launches(layer, TopK(budget, 1, 4), dtype, 16, capability)
    found = [(program, given) for program, given in found if program.__name__ not in ("attend", "combine")]
    names = [program.__name__ for program, _ in found]
    assert names == ["digest_pages", "bound", "score", "choose"]
    for program, arguments in found:
        result = compiled(program, arguments, capability)
        assert result.metadata.shared <= SHARED[capability][1] << 10
        assert stack(result.asm["cubin"], tmp_path) == 0
        if program.__name__ == "bound":
            # Both halves of a page's digest come in as few loads as there can be: 16 bytes each.
            wide = dtype != torch.float8_e4m3fn
            assert ("ld.global.v4.b32" in result.asm["ptx"]) == wide
            assert "fma.rn.f64" in result.asm["ptx"]
