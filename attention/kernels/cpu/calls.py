"""The functions of paged.cpp and the structures that they take."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch

from attention.kernels.cpu import native

SOURCE = Path(__file__).with_name("paged.cpp")

# The numbers by which native calls name a cache's dtype.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float8_e4m3fn: 3}


class Call(ctypes.Structure):
    """``Call`` in paged_call.hpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "rerotated", "keys", "values", "page_table")),
        *((name, ctypes.c_void_p) for name in ("rows", "owners", "ranges", "given")),
        *((name, ctypes.c_void_p) for name in ("sinks", "output", "parallel")),
        *((name, ctypes.c_int64) for name in ("entries", "range_heads", "range_count")),
        *((name, ctypes.c_int64) for name in ("query_heads", "kv_heads", "head_size", "value_size")),
        *((name, ctypes.c_int64) for name in ("row_stride", "head_stride", "page_size", "table_width")),
        *((name, ctypes.c_int64) for name in ("near", "dtype", "pairs", "threads")),
        *((name, ctypes.c_double) for name in ("scale", "softcap")),
    ]


class Write(ctypes.Structure):
    """``Write`` in paged_write.hpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("key", "value", "keys", "values", "slots")),
        *((name, ctypes.c_int64) for name in ("rows", "key_stride", "value_stride")),
        *((name, ctypes.c_int64) for name in ("key_numbers", "value_numbers", "dtype")),
    ]


class Compiled(NamedTuple):
    """The kernel, and the threads that it runs on.

    Attributes:
        attend: takes the address of a ``Call``.
        write: takes the address of a ``Write``.
        has_pairs: whether the processor has products of 16-bit integers that are faster than those of floats.
        team: the address of GOMP_parallel in the OpenMP runtime of torch itself, so that there is one pool.
    """

    attend: Any
    write: Any
    has_pairs: bool
    team: int


@functools.cache
def compiled() -> Compiled:
    """The kernel, compiled if it is not there yet.

    Raises:
        NativeError: it cannot be compiled; the message says why, as part of a sentence.
    """
    library = native.load(SOURCE, native.kept(), (Call, Write))
    library.longspan_attend.restype = library.longspan_write.restype = None
    has_pairs = bool(library.longspan_has_pairs())
    return Compiled(
        library.longspan_attend, library.longspan_write, has_pairs, *native.openmp("GOMP_parallel")
    )
