"""The Triton programs compiled for GPUs, down to machine code; this needs no GPU.

It needs a Triton that is not set to interpret, so ``test_triton`` runs this file in a process of its own.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attention import LayerSpec
from attention.kernels import (
    triton_code,
    triton_paged,
)
from attention.kernels.triton_device import Device
from attention.kernels.triton_paged import Triton
from attention.patterns.base import ContentPattern, Pattern
from attention.patterns.full import Full
from attention.patterns.sliding_window import SlidingWindow
from attention.patterns.topk import TopK
from tests.attention.cases import attend, make_case, update

NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float64: "fp64",
}

# Shared memory in KiB by compute capability: of a multiprocessor, and the most that a program may take.
SHARED = {80: (164, 163), 89: (100, 99), 90: (228, 227)}

LLAMA = LayerSpec(0, 32, 8, 128, 128, 0.088)


class Recorder:
    """Takes the launches of a program in its place."""

    def __init__(self, launches: list[tuple[Any, dict[str, Any]]], program: Any) -> None:
        self.launches = launches
        self.program = program

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        return lambda **arguments: self.launches.append((self.program, arguments))


def launches(
    layer: LayerSpec, pattern: Pattern, dtype: torch.dtype, page_size: int, capability: int
) -> list[tuple[Any, dict[str, Any]]]:
    """The launches of a long decode and of a chunk on a GPU."""
    found: list[tuple[Any, dict[str, Any]]] = []

    class Code:
        attend = Recorder(found, triton_code.attend)
        combine = Recorder(found, triton_code.combine)

    case = make_case(
        layer, [(1500, 1), (100, 100)], page_size, pattern=pattern, dtype=dtype, prompt_lens=[1400, 100]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_paged, "_code", lambda: Code)
        gpu = Device(132, SHARED[capability][0] << 10, divmod(capability, 10))
        patch.setattr(triton_paged, "device_of", lambda _: gpu)
        if dtype == torch.float8_e4m3fn:
            case.query = case.query.bfloat16()
        if isinstance(pattern, ContentPattern):
            update(pattern, layer, case.cache, case.batch)
        rerotated = case.query if pattern.rerotated else None
        attend(Triton(), layer, case.query, case.cache, case.batch, pattern, case.sinks, rerotated)
    return found


def compiled(program: Any, arguments: dict[str, Any], capability: int) -> Any:
    """As Triton would at the launch: numbers that are 1 are constants, multiples of 16 are known to be."""
    signature, constants, hints = {}, {}, {}
    for index, parameter in enumerate(program.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{NAMES[value.dtype]}"
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        whole = isinstance(value, int) and value % 16 == 0
        if isinstance(value, torch.Tensor) or (whole and not parameter.do_not_specialize):
            hints[(index,)] = [["tt.divisibility", 16]]
    options = {name: arguments[name] for name in ("num_warps", "num_stages") if name in arguments}
    source = ASTSource(program, signature, constants, hints)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def stack(cubin: bytes, folder: Any) -> int:
    """Bytes of local memory of each thread, for values that do not fit into registers."""
    path = folder / "program.cubin"
    path.write_bytes(cubin)
    tool = triton.knobs.nvidia.cuobjdump.path
    usage = subprocess.run(
        [tool, "--dump-resource-usage", str(path)], capture_output=True, text=True, check=True
    )
    return int(re.search(r"STACK:(\d+)", usage.stdout)[1])


def rerotating() -> SlidingWindow:
    pattern = SlidingWindow(500, 4)
    pattern.rerotated = 4
    return pattern


@pytest.mark.parametrize(
    ("capability", "layer", "pattern", "dtype", "page_size", "programs"),
    [
        (90, LLAMA, Full(), torch.bfloat16, 128, ["attend", "combine", "attend"]),
        (89, LayerSpec(0, 9, 3, 80, 128, 0.1, 700, 30.0, True), rerotating(), torch.float16, 16, None),
        (80, LayerSpec(0, 9, 3, 64, 64, 0.1), TopK(512, 1, 4), torch.float32, 16, None),
        (90, LLAMA, Full(), torch.float8_e4m3fn, 128, ["attend", "combine", "attend"]),
    ],
    ids=["full", "features", "float32", "float8"],
)
def test_programs_compile_and_fit(
    capability, layer, pattern, dtype, page_size, programs, tmp_path, monkeypatch
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = launches(layer, pattern, dtype, page_size, capability)
    names = [program.__name__ for program, _ in found]
    assert names == programs if programs else {"attend"} <= set(names)
    for program, arguments in found:
        result = compiled(program, arguments, capability)
        assert result.metadata.shared <= SHARED[capability][1] << 10
        assert stack(result.asm["cubin"], tmp_path) <= 64
        if program is triton_code.attend:
            # Keys and values of later tiles are on their way while one is computed.
            assert result.asm["ttgir"].count("ttg.async_copy_global_to_local") >= 4
            assert ("wgmma" in result.asm["ptx"]) == (capability == 90 and arguments["BLOCK_M"] >= 64)
