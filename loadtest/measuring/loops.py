"""The event loop that requests are timed in: uvloop, which costs less, where it is installed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from importlib.util import find_spec


def loop_name() -> str:
    """Its name, for documents."""
    return "uvloop" if find_spec("uvloop") else "asyncio"


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """The loop factory for ``asyncio.Runner``; ``None`` for asyncio's own."""
    if loop_name() == "asyncio":
        return None
    import uvloop

    return uvloop.new_event_loop
