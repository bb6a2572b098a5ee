"""The limits of the processor: what is counted is what is computed."""

import ctypes
import threading

import numpy as np
import pytest

from attention.kernels.cpu import levels, native
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
