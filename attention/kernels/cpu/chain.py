"""Native calls made one after another without returning to Python, which costs more than some of them."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from operator import is_
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from attention.kernels.cpu import native

_SOURCE = Path(__file__).with_suffix(".cpp")

Places = slice | np.ndarray[Any, Any]

Placed = tuple[tuple[Any, ...], int]
"""The tensors and arrays to whose memory a table points, and the number of threads."""


class NativeCall(NamedTuple):
    """One native call.

    Attributes:
        function: the address of a C function that takes one address and returns nothing.
        argument: that address. The caller keeps the memory behind it alive.
    """

    function: int
    argument: int


class _Entry(ctypes.Structure):
    """``Entry`` in chain.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in NativeCall._fields]


class Chain:
    """Calls in order, prepared once and made as often as wanted.

    Args:
        calls: in order.

    Raises:
        NativeError: nothing can be compiled here.
    """

    def __init__(self, calls: Sequence[NativeCall]) -> None:
        self._run = _compiled()
        self._entries = np.array(calls, dtype=np.dtype(_Entry))

    def run(self, watched: int | None = None) -> bool:
        """Makes the calls, or only the first of them.

        Args:
            watched: a descriptor that is looked at before each call: no more are made once it has something
                to read.

        Returns:
            Whether all calls were made.
        """
        count = len(self._entries)
        descriptor = ctypes.c_int64(-1 if watched is None else watched)
        made = self._run(ctypes.c_void_p(self._entries.ctypes.data), ctypes.c_int64(count), descriptor)
        return bool(made == count)


def same(one: Placed, other: Placed) -> bool:
    """Whether these are the very same tensors, whose memory then is where it was, and as many threads."""
    (tensors, threads), (others, other_threads) = one, other
    return threads == other_threads and len(tensors) == len(others) and all(map(is_, tensors, others))


def table(structure: type[ctypes.Structure], count: int) -> np.ndarray[Any, Any]:
    """``count`` of a C structure, zeroed, whose fields are columns: one assignment sets them all."""
    return np.zeros(count, dtype=np.dtype(structure))


def places(rows: Sequence[int]) -> Places:
    """Some rows of a ``table`` in the form in which assigning to them is fastest."""
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    evenly = range(rows[0], rows[-1] + 1, step)
    return slice(evenly.start, evenly.stop, step) if list(rows) == list(evenly) else np.array(rows)


def calls_of(function: Any, rows: np.ndarray[Any, Any]) -> list[NativeCall]:
    """The call of a ctypes function for each row of a ``table``."""
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    first, size = rows.ctypes.data, rows.itemsize
    return [NativeCall(address, first + i * size) for i in range(len(rows))]


@functools.cache
def _compiled() -> Any:
    chain = native.load(_SOURCE, native.kept(), (_Entry,)).longspan_chain
    chain.restype = ctypes.c_int64
    return chain
