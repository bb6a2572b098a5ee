"""The limits of the processor: what is counted is what is computed."""

import ctypes
import platform
import subprocess
import threading

import numpy as np
import pytest

from attention.kernels.cpu import compiling, levels, native
from loadtest.direct import limits
from tests.instructions import at, every_level, forget


@every_level
def test_every_level_has_its_limits(level):
    with at(level):
        found = limits.limits(threads=2, repeats=1, scale=1e-3)
    bfloat16 = found.pop("bfloat16, operations/s")
    assert (bfloat16 > 0) == (level in ("avx512-bf16", "amx-bf16"))
    assert len(found) == 3
    assert all(rate > 0 for rate in found.values())
    forget()


def test_all_memory_is_read_and_all_products_are_counted():
    library = native.load(limits._SOURCE, native.kept())
    library.longspan_read.restype = library.longspan_multiply.restype = ctypes.c_int64
    library.longspan_multiply.argtypes = [ctypes.c_int64, ctypes.c_int64]
    memory = np.zeros(1 << 16, dtype=np.uint8)

    def read():
        return library.longspan_read(ctypes.c_void_p(memory.ctypes.data), ctypes.c_int64(memory.nbytes))

    for place in (0, 1 << 14, memory.nbytes - 1):
        memory[place] = 1
        assert read() != 0
        memory[place] = 0
    assert read() == 0
    # Twelve sums of a vector, each of 4 products of 8-bit integers or one of floats in 32 bits.
    lanes = {"portable": 4, "x86-64-v3": 8, "avx-vnni": 8, "armv8-dotprod": 4}.get(levels.in_force().name, 16)
    assert library.longspan_multiply(0, 10) == 10 * 12 * lanes * 4 * 2
    assert library.longspan_multiply(2, 10) == 10 * 12 * lanes * 2


INSTRUCTIONS = {
    "x86-64-v3": ("vpmaddubsw", "vfmadd"),
    "avx-vnni": ("vpdpbusd", "vfmadd"),
    "x86-64-v4": ("vpmaddubsw", "vfmadd"),
    "avx512-vnni": ("vpdpbusd", "vfmadd"),
    "avx512-bf16": ("vpdpbusd", "vfmadd", "vdpbf16ps"),
    "amx-bf16": ("vpdpbusd", "vfmadd"),
    "armv8-dotprod": ("sdot", "fmla"),
}


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_the_compiler_leaves_no_product_out(name):
    """Each of the twelve sums of a round has its own product, and not one of a constant for all."""
    level = next(level for level in levels.LEVELS if level.name == name)
    if level.machine != platform.machine() or not compiling.accepts(level.arguments):
        pytest.skip(f"this compiler does not compile for {name}")
    command = [*compiling.compiler(), *compiling._FLAGS, *level.arguments, "-S", "-o", "-"]
    done = subprocess.run([*command, str(limits._SOURCE)], capture_output=True, text=True, check=True)
    for instruction in INSTRUCTIONS[name]:
        assert sum(instruction in line for line in done.stdout.splitlines()) >= 12, instruction


def test_a_level_that_there_is_not_is_refused(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["limits", "--native-level", "x86-64-v9"])
    with pytest.raises(SystemExit) as ended:
        limits.main()
    assert ended.value.code == 2
    assert "there is no level 'x86-64-v9' of native code; choose auto" in capsys.readouterr().err


def test_threads_work_at_the_same_time():
    met = threading.Barrier(2, timeout=30)

    def work(thread):
        met.wait()  # or it breaks
        return 1 + thread

    assert len(limits.rates(work, 2, repeats=3)) == 3
