"""Capture of a computation on a device, and its replay on the same memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class CudaGraph:
    """A computation that is captured once on a CUDA device and replayed on the same memory.

    Args:
        pool: of memory (``torch.cuda.graph_pool_handle``), shared with graphs that run one after another.
    """

    def __init__(self, pool: Any) -> None:
        self._graph, self._pool = torch.cuda.CUDAGraph(), pool

    def capture(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Computes, and captures the computation.

        Returns:
            The result of ``compute``; every replay fills it anew.

        Raises:
            Exception: the computation needs the host, or the device can't capture it.
        """
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            compute()  # programs are compiled and libraries set up, which a capture can't contain
            # A wait inside a capture would corrupt the device's state; here it is an error like any other.
            with _waits_refused():
                compute()
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(self._graph, pool=self._pool):
            return compute()

    def replay(self) -> None:
        """Queues the computation again."""
        self._graph.replay()


@contextmanager
def _waits_refused() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
