"""The operator in C++ and the structures that it takes; see linear.cpp and stage.hpp."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from attention.kernels.cpu import native
from attention.kernels.cpu.chain import NativeCall, calls_of, table

_SOURCE = Path(__file__).with_name("linear.cpp")


class Stage(ctypes.Structure):
    """``Stage`` in stage.hpp. The caller that fills it keeps alive the memory of its addresses."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("input", "norm", "codes", "scales", "bias", "output")),
        *(
            (name, ctypes.c_void_p)
            for name in ("cosines", "sines", "positions", "query_norm", "key_norm", "likely")
        ),
        *((name, ctypes.c_int64) for name in ("input_stride", "output_stride", "inputs", "outputs", "bits")),
        *((name, ctypes.c_int64) for name in ("gated", "added", "query_heads", "kv_heads", "head_size")),
        *((name, ctypes.c_double) for name in ("epsilon", "head_epsilon")),
    ]


class Run(ctypes.Structure):
    """``Run`` in stage.hpp: stages on the same rows, each with the output of the one before as input."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("stages", "parallel", "barrier", "given")),
        *((name, ctypes.c_int64) for name in ("count", "rows", "threads")),
    ]


class _Pack(ctypes.Structure):
    """``Pack`` in stage.hpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weights", "codes", "scales", "parallel")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs", "bits", "threads", "exactly")),
        *((name, ctypes.c_int64) for name in ("exact", "finite")),
    ]


class _LookUp(ctypes.Structure):
    """``LookUp`` in stage.hpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("ids", "codes", "scales", "output")),
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "outputs", "bits", "missing")),
    ]


class _Compiled(NamedTuple):
    """The functions, and the OpenMP runtime of torch itself, so that there is one pool of threads."""

    run: Any
    pack: Any
    look_up: Any
    parallel: int
    barrier: int


Given = np.ndarray[Any, Any] | None
"""Which rows belong to a prompt, bool ``[T]``; ``None``: none does."""


def run(stages: ctypes.Array[Stage], rows: int, given: Given = None) -> None:
    """Computes ``stages`` one after another, each on ``rows`` rows.

    Args:
        stages: the first reads the rows.
        rows: how many.
        given: which of them belong to a prompt.

    Raises:
        NativeError: it cannot be compiled here; ``check`` tells beforehand.
    """
    compiled = _compiled()
    compiled.run(
        ctypes.byref(
            Run(
                ctypes.addressof(stages),
                compiled.parallel,
                compiled.barrier,
                None if given is None else given.ctypes.data,
                len(stages),
                rows,
                torch.get_num_threads(),
            )
        )
    )


def chained(
    stages: np.ndarray[Any, Any], counts: Sequence[int]
) -> tuple[np.ndarray[Any, Any], list[NativeCall]]:
    """The same as ``run`` for later: calls of so many stages each, one after another.

    Args:
        stages: a table of ``Stage``.
        counts: of each call; they sum to the number of stages.

    Returns:
        A table of ``Run``, whose rows and threads are for the caller to set, and the calls. Both are good for
        as long as the caller keeps the two tables.

    Raises:
        NativeError: as in ``run``.
    """
    compiled = _compiled()
    runs = table(Run, len(counts))
    runs["stages"] = stages.ctypes.data + np.cumsum([0, *counts[:-1]]) * stages.itemsize
    runs["count"] = counts
    runs["parallel"], runs["barrier"] = compiled.parallel, compiled.barrier
    return runs, calls_of(compiled.run, runs)


def pack(
    weight: torch.Tensor, bits: int, codes: torch.Tensor, scales: torch.Tensor, *, exactly: bool
) -> bool:
    """Fills ``codes`` and ``scales``, which have the shapes that ``packing.Packed`` says.

    Args:
        weight: ``[N, K]`` float32, contiguous.
        bits: 4 or 8.
        codes: to be filled.
        scales: to be filled.
        exactly: search for codes that stand for exactly these weights, and stop where there are none.

    Returns:
        Whether the codes stand for exactly these weights.

    Raises:
        ValueError: weights that may be rounded need scales beyond 16 bits, or are not finite.
        NativeError: as in ``run``.
    """
    compiled = _compiled()
    call = _Pack(
        weights=weight.data_ptr(),
        codes=codes.data_ptr(),
        scales=scales.data_ptr(),
        parallel=compiled.parallel,
        inputs=weight.shape[1],
        outputs=weight.shape[0],
        bits=bits,
        threads=torch.get_num_threads(),
        exactly=exactly,
    )
    compiled.pack(ctypes.byref(call))
    if not call.finite and not exactly:
        raise ValueError("weights are NaN, infinite, or too large for scales of 16 bits")
    return bool(call.exact and call.finite)


def look_up(
    ids: torch.Tensor, bits: int, codes: torch.Tensor, scales: torch.Tensor, rows: torch.Tensor, outputs: int
) -> None:
    """Fills rows with some outputs' weights, as floats.

    Args:
        ids: of the outputs, int64 ``[T]``.
        bits: 4 or 8.
        codes: contiguous, in the shape that ``packing.Packed`` says.
        scales: likewise.
        rows: float32 ``[T, K]``, contiguous, to be filled.
        outputs: ``N``.

    Raises:
        IndexError: an id is not one of ``N``.
        NativeError: as in ``run``.
    """
    ids = ids.contiguous()
    count, inputs = rows.shape
    assert len(ids) == count
    call = _LookUp(
        ids.data_ptr(), codes.data_ptr(), scales.data_ptr(), rows.data_ptr(), count, inputs, outputs, bits
    )
    _compiled().look_up(ctypes.byref(call))
    if call.missing:
        raise IndexError(f"{call.missing} of {count} ids are none of the {outputs} there are")


def check() -> None:
    """Compiles the operator if it is not there yet.

    Raises:
        NativeError: that is not possible; the message says why, as part of a sentence.
    """
    _compiled()


@functools.cache
def _compiled() -> _Compiled:
    library = native.load(_SOURCE, native.kept(), (Stage, Run, _Pack, _LookUp))
    functions = library.longspan_run, library.longspan_pack, library.longspan_look_up
    for function in functions:
        function.restype = None
    return _Compiled(*functions, *native.openmp("GOMP_parallel", "GOMP_barrier"))
