"""The native code on other processors, emulated, and under sanitizers, against what it computes here."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from attention import LayerSpec
from attention.dtypes import CACHE_DTYPES, cast
from attention.kernels.cpu import calls, compiling, levels
from attention.kernels.cpu.paged import CpuPaged
from attention.kernels.reference import Reference
from attention.patterns.full import Full
from attention.patterns.sliding_window import SlidingWindow
from attention.patterns.topk import TopK
from attention.patterns.written import Written
from server.models.quantized import native as quantized
from server.models.quantized.linear import QuantizedLinear
from server.models.quantized.packing import pack
from tests.attention.cases import attend, make_case
from tests.instructions import at
from tests.stress.native_calls import SOURCES, Recorder, read, write

DRIVER = Path(__file__).with_name("native_driver.cpp")
PLAIN_FLAGS = ("-std=c++17", "-g", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-pthread")


def write_rows(dtype: torch.dtype) -> None:
    """Writes rows that fill no whole vector, some of them beyond the dtype, to slots in another order."""
    key, value = torch.randn(9, 50), torch.randn(9, 24) * 1e5
    keys, values = torch.zeros(9, 38, dtype=dtype), torch.zeros(9, 24, dtype=dtype)
    slots = torch.tensor([8, 1, 2, 7, 4, 5, 6, 3, 0])
    tensors = {"key": key, "value": value, "keys": keys, "values": values, "slots": slots}
    sizes = {"rows": 9, "key_stride": 50, "value_stride": 24, "key_numbers": 38, "value_numbers": 24}
    structure = calls.Write(
        **{name: tensor.data_ptr() for name, tensor in tensors.items()}, **sizes, dtype=calls.DTYPES[dtype]
    )
    calls.compiled().write(ctypes.byref(structure))
    torch.testing.assert_close(keys[slots].float(), cast(key[:, :38], dtype).float(), rtol=0, atol=0)
    torch.testing.assert_close(
        values[slots].float(), cast(value, dtype).float(), rtol=0, atol=0, equal_nan=True
    )


def multiply_both_kinds(linear: QuantizedLinear, rows: int, of_prompts: int) -> None:
    """Rows that 8 bits and bfloat16 hold exactly, of which the last ones belong to a prompt."""
    x = torch.randint(-127, 128, (rows, linear.in_features)).float()
    x[:, ::32] = 127
    output = torch.empty(rows, linear.out_features)
    stage = linear.stage(input=x.data_ptr(), output=output.data_ptr())
    quantized.run((quantized.Stage * 1)(stage), rows, np.arange(rows) >= rows - of_prompts)


def recorded() -> Recorder:
    """Attention, selection and packed products in all forms, each compared with the oracle first."""
    recorder = Recorder()
    layers = (
        LayerSpec(0, 6, 2, 64, 64, 0.125),
        LayerSpec(0, 5, 1, 20, 12, 0.2, window=50, softcap=8.0, sinks=True),
    )
    shapes, prompt_lens = [(330, 1), (190, 100), (70, 9), (90, 1)], [330, 190, 70, 1]
    torch.set_num_threads(3)
    with recorder.recording():
        for dtype in CACHE_DTYPES.values():
            for layer in layers:
                for pattern in (Full(), SlidingWindow(window=33, sinks=5), TopK(6, 1, 2)):
                    if isinstance(pattern, TopK):
                        pattern.prefill = "sparse"
                    case = make_case(layer, shapes, 8, pattern=pattern, dtype=dtype, prompt_lens=prompt_lens)
                    recorder.rows, recorder.sequences = len(case.query), len(shapes)
                    recorder.pages = len(case.cache.keys) * case.cache.keys.shape[1] // 8
                    parts = case.layer, case.query, case.cache, case.batch, pattern, case.sinks
                    if isinstance(pattern, TopK):
                        written = Written.known(case.batch.host, case.batch.device)
                        CpuPaged().update(case.layer, case.cache, written, pattern)
                    error = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
                    torch.testing.assert_close(
                        attend(CpuPaged(), *parts), attend(Reference(), *parts), rtol=error, atol=error
                    )
        for dtype in CACHE_DTYPES.values():
            write_rows(dtype)
        for bits in (4, 8):
            weight = torch.randn(272, 1088, generator=torch.Generator().manual_seed(bits))
            packed = pack(weight, bits)
            linear = QuantizedLinear(packed, 1088, 272, torch.randn(272))
            multiply_both_kinds(linear, 96, 1)
            for rows in (1, 2, 7, 140):
                linear(torch.randn(rows, 1088) * (1 + 30 * (torch.randn(rows, 1088) > 2)))
            found = torch.empty(3, 1088)
            quantized.look_up(torch.tensor([0, 271, 5]), bits, packed.codes, packed.scales, found, 272)
    assert all(recorder.made.values())
    return recorder


@pytest.fixture(scope="module")
def here() -> Recorder:
    # Of the levels whose products are fused, one that does not round queries to bfloat16.
    fused = [level.name for level in levels.executable() if "avx512_bf16" not in level.features]
    with at(fused[-1]):
        return recorded()


def run_elsewhere(here: Recorder, folder: Path, compiler: list[str], runner: list[str], error: float) -> None:
    """Every recorded call, compiled by ``compiler`` and run by ``runner``, gives what it gave here.

    Floats that are computed may differ by ``error``, relative to the root mean square of the output; codes,
    selected pages and what is written to a cache may not.
    """
    for source, functions in SOURCES.items():
        program, made = folder / source.stem, here.made[source]
        listed = " ".join(f"LONGSPAN_FUNCTION({name})" for name in functions)
        command = [*compiler, *PLAIN_FLAGS, f"-DLONGSPAN_FUNCTIONS={listed}", str(DRIVER), str(source)]
        built = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True)
        assert built.returncode == 0, built.stderr
        given, results = folder / "calls", folder / "results"
        write(made, given)
        done = subprocess.run([*runner, program, given, results], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        for call, outputs in zip(made, read(made, results), strict=True):
            name = functions[call.function]
            for index, expected in call.outputs.items():
                if name in ("longspan_write", "longspan_update", "longspan_select", "longspan_pack"):
                    assert outputs[index] == expected, name
                    continue
                found, wanted, before = (
                    torch.frombuffer(bytearray(numbers), dtype=torch.int32)
                    for numbers in (outputs[index], expected, call.buffers[index])
                )
                written = wanted != before
                assert written.any()
                assert torch.equal(found[~written], before[~written]), name
                one, other = found[written].view(torch.float32), wanted[written].view(torch.float32)
                size = float(other.square().mean().sqrt())
                assert float((one - other).square().mean().sqrt()) <= error * size, name


def test_calls_are_recorded(here: Recorder) -> None:
    """The long tests below begin with this, so that a field that is renamed is noticed at once."""
    functions = {(source, call.function) for source, calls in here.made.items() for call in calls}
    assert functions == {
        (source, number) for source, names in SOURCES.items() for number in range(len(names))
    }


@pytest.mark.stress
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("level", [level.name for level in levels.of_machine("aarch64")])
def test_aarch64_under_emulation(level: str, here: Recorder, tmp_path: Path) -> None:
    compiler, emulator = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
    if missing := [name for name in (compiler, emulator) if shutil.which(name) is None]:
        pytest.skip(f"{', '.join(missing)}: install Debian's g++-aarch64-linux-gnu and qemu-user-static")
    (arguments,) = (one.arguments for one in levels.LEVELS if one.name == level)
    run_elsewhere(here, tmp_path, [compiler, "-O3", "-static", *arguments], [emulator], error=1e-6)


@pytest.mark.stress
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("level", [level.name for level in levels.executable()])
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_under_sanitizers(level: str, sanitizers: str, here: Recorder, tmp_path: Path) -> None:
    (arguments,) = (one.arguments for one in levels.LEVELS if one.name == level)
    flags = ["-O1", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", *arguments]
    # Where addresses are spread widely, the thread sanitizer has no room for what it remembers.
    spread = ["setarch", "--addr-no-randomize"] if shutil.which("setarch") else []
    # Products may be fused otherwise than here, so that an activation between two codes goes another way; and
    # one level rounds queries to bfloat16.
    run_elsewhere(here, tmp_path, [*compiling.compiler(), *flags], spread, error=5e-3)
