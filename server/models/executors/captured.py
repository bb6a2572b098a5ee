"""Decode steps captured once for each batch size and replayed, so that the host launches one graph per step.

A decode step of a large model is hundreds of kernels, and launching them from Python takes longer than a GPU
takes to compute them. A captured step computes on the same memory each time, so what changes from step to
step lies in buffers: ids, positions and, for each row of the page table, its sequence's pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from attention.batch import AttentionBatch
from attention.kernels.capturable import Capturable
from attention.step import DeviceBatch
from attention.transfer import device_only, to_device
from server.models.executors.base import PageTable, StepInput
from server.models.executors.eager import EagerExecutor
from server.models.executors.graph import Graph

# Share of the largest logit, for a step captured against the same step computed directly: attention may be
# cut into other parts, which rounds in another order.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}


class CaptureError(Exception):
    """Decode steps can't be captured; the message says why, as part of a sentence."""


@dataclass(slots=True)
class _Row:
    """A row of the device's page table: which generation of a sequence's it holds, and how many pages."""

    index: int
    generation: int
    pages: int = 0


@dataclass(slots=True)
class _Captured:
    """A captured step of one batch size."""

    ids: torch.Tensor  # int64 [size]
    places: torch.Tensor  # int64 [2, size]: positions, rows of the page table
    graph: Graph
    logits: torch.Tensor  # [size, V]


class CapturedExecutor:
    """Decode steps are replayed, all others are the eager executor's; see ``Executor``.

    Captured steps share one page table, which lies on the device and is kept from step to step. A batch of a
    size that was not captured is filled up with copies of its first token, which compute and write the same
    as that does.

    Args:
        eager: the executor that is captured. None of its cache's pages may be in use yet.
        graph: makes an empty graph.
        most: sequences of a step, at most.
        context_length: tokens of a sequence, at most.

    Attributes:
        sizes: of the batches that are captured.

    Raises:
        CaptureError: a step can't be captured, or computes something else then.
    """

    name = "cuda_graphs"
    thread_invariant = False

    @torch.inference_mode()
    def __init__(
        self, eager: EagerExecutor, graph: Callable[[], Graph], *, most: int, context_length: int
    ) -> None:
        if reason := obstacle(eager):
            raise CaptureError(reason)
        self.reason = f"decode steps of up to {most} sequences are captured"
        self.model, self.attention, self.cache, self.rope = (
            eager.model,
            eager.attention,
            eager.cache,
            eager.rope,
        )
        cache = eager.cache
        self.sizes = batch_sizes(most)
        self._eager, self._page_size = eager, cache.page_size
        self._width = -(-context_length // cache.page_size)
        device = next(iter(cache.layers.values())).keys.device
        self._table = torch.zeros(most, self._width, dtype=torch.int32, device=device)
        self._rows: dict[PageTable, _Row] = {}
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

    def logits(self, step: StepInput) -> torch.Tensor:
        """See ``Executor.logits``."""
        return self._replayed(step) if self._fits(step) else self._eager.logits(step)

    def _fits(self, step: StepInput) -> bool:
        """Whether these are decodes, a token each, as many as a captured step can compute."""
        return (
            step.rows is None
            and 0 < len(step.counts) <= self.sizes[-1]
            and max(step.counts) == 1
            and all(have >= prompt for have, prompt in zip(step.computed, step.prompt_lens, strict=True))
        )

    def _replayed(self, step: StepInput) -> torch.Tensor:
        count = len(step.counts)
        captured = self._steps[next(size for size in self.sizes if size >= count)]
        filled = [*range(count), *[0] * (captured.ids.shape[0] - count)]
        places = np.array([step.computed, self._hold(step.tables)], dtype=np.int64)
        captured.places.copy_(to_device(torch.from_numpy(places[:, filled]), self._table.device))
        captured.ids[:count] = step.ids
        captured.ids[count:] = step.ids[:1]
        captured.graph.replay()
        # The next replay fills the same memory, maybe before these logits are read for the last time.
        return captured.logits[:count].clone()

    def _hold(self, tables: Sequence[PageTable]) -> list[int]:
        """The sequences' rows of the device's page table, brought up to date."""
        held = self._rows
        missing = [t for t in tables if t not in held or held[t].generation != t.generation]
        if missing:
            self._assign(tables, missing)
        changes, rows = [], []
        for table in tables:
            row = self._rows[table]
            rows.append(row.index)
            # Evicted pages stay: no query looks there any more.
            if row.pages < len(table.pages):
                changes.append((row.index, row.pages, table.pages[row.pages :]))
                row.pages = len(table.pages)
        if changes:
            self._put(changes)
        return rows

    def _assign(self, tables: Sequence[PageTable], missing: list[PageTable]) -> None:
        staying = {t: self._rows[t] for t in set(tables).difference(missing)}
        free = iter(sorted(set(range(len(self._table))).difference(row.index for row in staying.values())))
        self._rows = staying | {t: _Row(next(free), t.generation) for t in missing}

    def _put(self, changes: list[tuple[int, int, list[int]]]) -> None:
        """Writes pages to the table, from a column of a row on."""
        at = np.concatenate([np.arange(len(new)) + row * self._width + first for row, first, new in changes])
        pages = np.concatenate([new for _, _, new in changes])
        both = to_device(torch.from_numpy(np.stack([at, pages]).astype(np.int64)), self._table.device)
        self._table.view(-1).scatter_(0, both[0], both[1].int())

    def _capture(self, size: int, graph: Graph, pages: list[int]) -> _Captured:
        """A captured step of this batch size, checked against the same step computed directly."""
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
            expected = self._eager.forward(tokens, plain)
        expected = expected.clone()
        places = to_device(torch.tensor([[last] * size, list(range(size))]), device).clone()

        def compute() -> torch.Tensor:
            positions, rows = places
            batch = DeviceBatch.captured(rows, positions, self._table, self._page_size)
            return self._eager.forward(tokens, batch)

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


def obstacle(eager: EagerExecutor) -> str | None:
    """Why an executor's decode steps can't be captured, part of a sentence; ``None`` if it may be tried."""
    if eager.rope is not None:
        return f"{eager.rope.kind} RoPE rotates each sequence by its own length"
    kernel = eager.attention.kernel
    if not isinstance(kernel, Capturable):
        return f"kernel {kernel.name} plans every step on the host, as all but triton do"
    return next(filter(None, (kernel.uncapturable(pattern) for pattern, _, _ in eager.attention.alike)), None)


def batch_sizes(most: int) -> tuple[int, ...]:
    """Sizes up to ``most`` of which each is at most one and a half times the one before, 1 and 2 aside."""
    steps = {factor << power for factor in (1, 3) for power in range(most.bit_length())}
    return tuple(sorted({size for size in steps if size < most} | {most}))
