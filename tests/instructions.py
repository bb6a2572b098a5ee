"""The levels of native code that this machine can execute, and how to run some code at one of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from attention.kernels.cpu import calls, levels, select
from server.models.quantized import native as quantized

_COMPILED = (calls.compiled, select.compiled, quantized._compiled)
_EXECUTABLE = [level.name for level in levels.executable()]


def _parameter(name: str):
    left_out = pytest.mark.skip(reason=f"this processor cannot execute {name}")
    return pytest.param(name, marks=() if name in _EXECUTABLE else left_out)


every_level = pytest.mark.parametrize("level", [_parameter(level.name) for level in levels.LEVELS])
"""Runs a test once for each level; those that the machine cannot execute are skipped, and so reported."""


with_matrix_unit = pytest.mark.parametrize("level", [_parameter("amx-bf16")])
"""Runs a test at the level whose processors have a matrix unit."""


def multiplies_bfloat16() -> bool:
    """Whether ``cpu_paged`` rounds queries to bfloat16 in a decode over a cache in bfloat16."""
    return "avx512_bf16" in levels.in_force().features


def fuses_products() -> bool:
    """Whether products and the sums that they are part of are rounded once."""
    return "fma" in levels.in_force().features or "armv8-dotprod" in _EXECUTABLE


@contextmanager
def at(level: str) -> Iterator[None]:
    """Native code that is called in here is of this level."""
    before = levels._InForce.level
    forget()
    levels.use(level)
    try:
        yield
    finally:
        levels._InForce.level = before
        forget()


def forget() -> None:
    """Libraries are looked for again, and may be of another level."""
    levels._InForce.loaded = False
    for compiled in _COMPILED:
        compiled.cache_clear()
