"""Whether a kernel is being compiled: Triton does so within a step, the first time that a shape needs it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def tell_of_compiling(tell: Callable[[bool], None]) -> None:
    """From now on ``tell`` is called with ``True`` before a kernel is compiled and with ``False`` after.

    Nothing where Triton is not in use; kernels of a CPU are compiled before the engine is ready.
    """
    if "triton" not in sys.modules:
        return
    from triton import knobs

    def hook(under_way: bool) -> Callable[..., bool]:
        def call(**_: Any) -> bool:
            tell(under_way)
            return False  # the first of the two hooks would say with True that there is nothing to compile

        return call

    knobs.runtime.jit_cache_hook = hook(True)
    knobs.runtime.jit_post_compile_hook = hook(False)
