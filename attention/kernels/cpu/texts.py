"""Attention within the texts of a flattened batch in C++, all of them in one call; see texts.cpp."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch

from attention.kernels.cpu import levels, native

SOURCE = Path(__file__).with_suffix(".cpp")


class Texts(ctypes.Structure):
    """``Texts`` in texts_call.hpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "output", "begins", "parallel")),
        *((name, ctypes.c_int64) for name in ("texts", "query_heads", "kv_heads", "head_size", "value_size")),
        *((name, ctypes.c_int64) for name in ("query_stride", "query_head_stride")),
        *((name, ctypes.c_int64) for name in ("key_stride", "key_head_stride")),
        *((name, ctypes.c_int64) for name in ("value_stride", "value_head_stride", "window", "threads")),
        ("scale", ctypes.c_double),
    ]


class Compiled(NamedTuple):
    """The kernel, and the threads that it runs on.

    Attributes:
        attend: takes the address of a ``Texts``.
        team: the address of GOMP_parallel in the OpenMP runtime of torch itself, so that there is one pool.
    """

    attend: Any
    team: int


@functools.cache
def compiled() -> Compiled:
    """The kernel, compiled if it is not there yet.

    Raises:
        NativeError: it cannot be compiled; the message says why, as part of a sentence.
    """
    library = native.load(SOURCE, native.kept(), (Texts,))
    library.longspan_attend_texts.restype = None
    return Compiled(library.longspan_attend_texts, *native.openmp("GOMP_parallel"))


@functools.cache
def obstacle() -> str | None:
    """Why torch computes encoders' floats instead; ``None`` where native code does.

    It does at the levels at which it was measured to be faster (docs/decisions/0043).
    """
    features = levels.in_force().features
    if "avx2" not in features or "avx512f" in features:
        return f"native code for floats is for AVX2, and its level is {levels.in_force().name}"
    try:
        compiled()
    except native.NativeError as error:
        return str(error)
    return None


def takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether ``attend_texts`` computes these: float32 on a CPU, and a head's numbers one after another.

    Args:
        query: ``[T, H, D]``.
        key: ``[T, Hkv, D]``.
        value: ``[T, Hkv, Dv]``.
    """
    return all(
        each.dtype == torch.float32 and each.device.type == "cpu" and each.stride(2) == 1
        for each in (query, key, value)
    )


def attend_texts(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    begins: torch.Tensor,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Attention in which each token sees all of its own text. A text's result does not depend on the others.

    Args:
        query: ``[T, H, D]``.
        key: ``[T, Hkv, D]``.
        value: ``[T, Hkv, Dv]``, all as ``takes`` demands.
        begins: int64 ``[texts + 1]``, each text's first token, ascending, and ``T`` at the end.
        scale: of the logits, above 0.
        window: token ``i`` sees ``j`` where ``|i - j|`` is less; ``None`` for all of the text.

    Returns:
        ``[T, H, Dv]``, contiguous.
    """
    tokens, heads, size = query.shape
    made = compiled()
    output = query.new_empty(tokens, heads, value.shape[2])
    call = Texts(
        *(tensor.data_ptr() for tensor in (query, key, value, output, begins)),
        *(made.team, len(begins) - 1, heads, key.shape[1], size, value.shape[2]),
        *(stride for tensor in (query, key, value) for stride in tensor.stride()[:2]),
        *(window or 0, torch.get_num_threads(), scale),
    )
    made.attend(ctypes.byref(call))
    return output
