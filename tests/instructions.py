"""Which instructions the C++ is compiled with here, and how to compile it without some of them."""

from __future__ import annotations

import functools
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from attention.kernels.cpu import calls, native, select
from server.models.quantized import native as quantized

OLDER = ("-mno-avx", "-mno-f16c", "-mno-fma")
"""What leaves an x86 processor with SSE alone."""

_COMPILED = (calls.compiled, select.compiled, quantized._compiled)


def multiplies_bfloat16() -> bool:
    """Whether ``cpu_paged`` rounds queries to bfloat16 in a decode over a cache in bfloat16."""
    return "__AVX512BF16__" in _macros(*native.compiler())


def fuses_products() -> bool:
    """Whether products and the sums that they are part of are rounded once."""
    macros = _macros(*native.compiler())
    return "__FMA__" in macros or "__aarch64__" in macros


@contextmanager
def compiled_with(*flags: str) -> Iterator[None]:
    """Code that is called in here was compiled with these flags too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", " ".join([*native.compiler(), *flags]))
        _forget()
        try:
            yield
        finally:
            _forget()


@contextmanager
def without(*flags: str) -> Iterator[None]:
    """The same for flags that only x86's compilers know."""
    if platform.machine() != "x86_64":
        pytest.skip("the instructions left out are x86's")
    with compiled_with(*flags):
        yield


def _forget() -> None:
    for compiled in _COMPILED:
        compiled.cache_clear()


@functools.cache
def _macros(*compiler: str) -> str:
    command = [*compiler, "-march=native", "-dM", "-E", "-x", "c++", "/dev/null"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
