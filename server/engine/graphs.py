"""Decode steps captured once for each batch size and replayed, so that the host launches one graph per step.

A decode step of a large model is hundreds of kernels, and launching them from Python takes longer than a GPU
takes to compute them. A captured step computes on the same memory each time, so what changes from step to
step lies in buffers: ids, positions and, for each row of the page table, its sequence's pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Listed
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from attention.backends import Attention
from attention.batch import AttentionBatch
from attention.cache import PagedCache
from attention.kernels.capturable import Capturable
from attention.step import DeviceBatch
from attention.transfer import device_only, to_device
from server.engine.scheduler import Scheduled
from server.engine.sequence import Sequence

# Of the largest logit, for a step captured against the same step computed directly: attention may be cut into
# other parts, which rounds in another order.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}

Forward = Callable[[torch.Tensor, AttentionBatch | DeviceBatch], torch.Tensor]


class CaptureError(Exception):
    """Decode steps can't be captured; the message says why, as part of a sentence."""


class Graph(Protocol):
    """What was computed once on a device, and can be again on the same memory."""

    def capture(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Computes, and notes how.

        Returns:
            What ``compute`` gave; every replay fills it anew.

        Raises:
            Exception: what is computed needs the host, or the device can't do it.
        """

    def replay(self) -> None:
        """Queues the same again."""


class CudaGraph:
    """A graph of CUDA.

    Args:
        pool: of memory (``torch.cuda.graph_pool_handle``), shared with graphs that run one after another.
    """

    def __init__(self, pool: Any) -> None:
        self._graph, self._pool = torch.cuda.CUDAGraph(), pool

    def capture(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """See ``Graph.capture``."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            compute()  # programs are compiled and libraries set up, which a capture can't contain
            # A wait inside a capture would spoil the device's state; here it is an error like any other.
            with _waits_refused():
                compute()
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(self._graph, pool=self._pool):
            return compute()

    def replay(self) -> None:
        """See ``Graph.replay``."""
        self._graph.replay()


@contextmanager
def _waits_refused() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@dataclass(slots=True)
class _Row:
    """A row of the page table, and how many of its sequence's pages it holds."""

    index: int
    preemptions: int
    pages: int = 0


@dataclass(slots=True)
class _Captured:
    """A step of so many tokens."""

    ids: torch.Tensor  # int64 [size]
    places: torch.Tensor  # int64 [2, size]: positions, rows of the page table
    graph: Graph
    logits: torch.Tensor  # [size, V]


class DecodeGraphs:
    """Captured decode steps over one page table, which lies on the device and is kept from step to step.

    A batch of a size that was not captured is filled up with copies of its first token, which compute and
    write the same as that does.

    Args:
        forward: the model's logits ``[T, V]`` of ids ``[T]``, over the engine's cache.
        graph: makes an empty graph.
        cache: the engine's, none of whose pages may be in use yet.
        most: sequences of a step, at most.
        context_length: tokens of a sequence, at most.

    Attributes:
        sizes: of the batches that are captured.

    Raises:
        CaptureError: a step can't be captured, or computes something else then.
    """

    @torch.inference_mode()
    def __init__(
        self,
        forward: Forward,
        graph: Callable[[], Graph],
        cache: PagedCache,
        *,
        most: int,
        context_length: int,
    ) -> None:
        self.sizes = batch_sizes(most)
        self._forward, self._page_size = forward, cache.page_size
        self._width = -(-context_length // cache.page_size)
        device = next(iter(cache.layers.values())).keys.device
        self._table = torch.zeros(most, self._width, dtype=torch.int32, device=device)
        self._rows: dict[Sequence, _Row] = {}
        self._steps: dict[int, _Captured] = {}
        trial = [1 + row % (cache.pages - 1) for row in range(most)]
        self._put([(row, 0, [page]) for row, page in enumerate(trial)])
        try:
            # The largest first: the others find their memory in what it gave back.
            for size in reversed(self.sizes):
                self._steps[size] = self._capture(size, graph(), trial[:size])
        except CaptureError:
            raise
        except Exception as error:  # waits, memory, compilers and drivers fail in many ways
            reason = " ".join(str(error).split())
            raise CaptureError(f"{type(error).__name__}: {reason}") from error

    def fits(self, scheduled: Listed[Scheduled]) -> bool:
        """Whether these are decodes, a token each, as many as a captured step can compute."""
        return 0 < len(scheduled) <= self.sizes[-1] and all(
            tokens == s.remaining == 1 and s.computed >= s.prompt_len for s, tokens in scheduled
        )

    def logits(self, sequences: Listed[Sequence], ids: torch.Tensor) -> torch.Tensor:
        """Queues a step.

        Args:
            sequences: of scheduled that ``fits``, each with the pages that it needs.
            ids: int64 ``[B]`` on the device, of the tokens to compute.

        Returns:
            ``[B, V]``.
        """
        count = len(sequences)
        step = self._steps[next(size for size in self.sizes if size >= count)]
        filled = [*range(count), *[0] * (step.ids.shape[0] - count)]
        places = np.array([[s.computed for s in sequences], self._hold(sequences)], dtype=np.int64)
        step.places.copy_(to_device(torch.from_numpy(places[:, filled]), self._table.device))
        step.ids[:count] = ids
        step.ids[count:] = ids[:1]
        step.graph.replay()
        # The next replay fills the same memory, maybe before these have been looked at for the last time.
        return step.logits[:count].clone()

    def _hold(self, sequences: Listed[Sequence]) -> list[int]:
        """The sequences' rows of the page table, brought up to date."""
        held = self._rows
        missing = [s for s in sequences if s not in held or held[s].preemptions != s.preemptions]
        if missing:
            self._assign(sequences, missing)
        changes, rows = [], []
        for sequence in sequences:
            row = self._rows[sequence]
            rows.append(row.index)
            # Pages that the pattern lets go stay: nothing looks there any more.
            if row.pages < len(sequence.pages):
                changes.append((row.index, row.pages, sequence.pages[row.pages :]))
                row.pages = len(sequence.pages)
        if changes:
            self._put(changes)
        return rows

    def _assign(self, sequences: Listed[Sequence], missing: list[Sequence]) -> None:
        staying = {s: self._rows[s] for s in set(sequences).difference(missing)}
        free = iter(sorted(set(range(len(self._table))).difference(row.index for row in staying.values())))
        self._rows = staying | {s: _Row(next(free), s.preemptions) for s in missing}

    def _put(self, changes: list[tuple[int, int, list[int]]]) -> None:
        """Writes pages to the table, from a column of a row on."""
        at = np.concatenate([np.arange(len(new)) + row * self._width + first for row, first, new in changes])
        pages = np.concatenate([new for _, _, new in changes])
        both = to_device(torch.from_numpy(np.stack([at, pages]).astype(np.int64)), self._table.device)
        self._table.view(-1).scatter_(0, both[0], both[1].int())

    def _capture(self, size: int, graph: Graph, pages: list[int]) -> _Captured:
        """A step of so many tokens, which gives what the same step gives when computed directly."""
        device, last = self._table.device, min(2, self._page_size - 1)
        ids = [1 + page % 97 for page in pages]  # rows that share a page share its tokens
        tokens = to_device(torch.tensor(ids), device)
        for position in range(last + 1):
            plain = AttentionBatch.build(
                [position] * size,
                [1] * size,
                [[page] for page in pages],
                self._page_size,
                device,
                prompt_lens=[0] * size,
            )
            expected = self._forward(tokens, plain)
        expected = expected.clone()
        places = to_device(torch.tensor([[last] * size, list(range(size))]), device).clone()

        def compute() -> torch.Tensor:
            positions, rows = places
            return self._forward(tokens, DeviceBatch.captured(rows, positions, self._table, self._page_size))

        with device_only():
            logits = graph.capture(compute)
        logits.zero_()
        graph.replay()
        error = float((logits - expected).abs().max()) / float(expected.abs().max())
        tolerance = _TOLERANCE[logits.dtype]
        if not error <= tolerance:
            raise CaptureError(
                f"a captured step's logits differ by {error:.2g} of the largest from those of the same step "
                f"computed directly (up to {tolerance:g} is rounding)"
            )
        return _Captured(tokens, places, graph, logits)


def uncapturable(attention: Attention) -> str | None:
    """Why steps of this attention can't be captured, as part of a sentence; ``None`` if they can."""
    kernel = attention.kernel
    if not isinstance(kernel, Capturable):
        return f"kernel {kernel.name} plans every step on the host, as all but triton do"
    return next(filter(None, (kernel.uncapturable(pattern) for pattern, _, _ in attention.alike)), None)


def batch_sizes(most: int) -> tuple[int, ...]:
    """Sizes up to ``most`` of which each is at most one and a half times the one before, 1 and 2 aside."""
    steps = {factor << power for factor in (1, 3) for power in range(most.bit_length())}
    return tuple(sorted({size for size in steps if size < most} | {most}))
