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
from server.models.difference import relative_error
from server.models.executors.base import Executor, PageTable, StepInput
from server.models.executors.eager import EagerExecutor
from server.models.executors.graph import CudaGraph

# The largest root mean square error of a row's logits, as a share of their standard deviation, for a step
# captured against the same step computed directly: attention may be cut into other parts, which rounds in
# another order.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}

# Pages of each row on trial, so that it has a page table and keys in parts, and how many rows have their own.
_TRIAL_PAGES, _TRIAL_GROUPS = 3, 8


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
    graph: CudaGraph
    logits: torch.Tensor  # [size, V]


class CapturedExecutor(Executor):
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

    @torch.inference_mode()
    def __init__(
        self, eager: EagerExecutor, graph: Callable[[], CudaGraph], *, most: int, context_length: int
    ) -> None:
        if reason := obstacle(eager):
            raise CaptureError(reason)
        self.reason = f"decode steps of up to {most} sequences are captured"
        self.model, self.device, self.dtype = eager.model, eager.device, eager.dtype
        self.attention, self.rope = eager.attention, eager.rope
        cache = self.cache = eager.cache
        self.sizes = batch_sizes(most)
        self._eager, self._page_size = eager, cache.page_size
        self._width = -(-context_length // cache.page_size)
        self._table = torch.zeros(most, self._width, dtype=torch.int32, device=self.device)
        self._rows: dict[PageTable, _Row] = {}
        self._steps: dict[int, _Captured] = {}
        try:
            trial = self._trial(most)
            self._put([(row, 0, pages) for row, pages in enumerate(trial)])
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

    def _trial(self, most: int) -> list[list[int]]:
        """Pages of as many rows, with keys of all positions up to the last page's second.

        Some rows share their pages, and with them their tokens.
        """
        pages = min(_TRIAL_PAGES, self._width, self.cache.pages - 1)
        groups = min(most, _TRIAL_GROUPS, (self.cache.pages - 1) // pages)
        owned = [list(range(1 + group * pages, 1 + (group + 1) * pages)) for group in range(groups)]
        last = self._last(owned[0])
        if last:
            before = AttentionBatch.build(
                [0] * groups,
                [last] * groups,
                owned,
                self._page_size,
                self.device,
                prompt_lens=[0] * groups,
            )
            ids = torch.tensor([1 + (7 * at + group) % 97 for group in range(groups) for at in range(last)])
            self._eager.forward(to_device(ids, self.device), before)
        return [owned[row % groups] for row in range(most)]

    def _last(self, pages: list[int]) -> int:
        """The position at which steps are tried: the last page's second."""
        return (len(pages) - 1) * self._page_size + min(1, self._page_size - 1)

    def _capture(self, size: int, graph: CudaGraph, pages: list[list[int]]) -> _Captured:
        """A captured step of this batch size, checked against the same step computed directly."""
        device, last = self.device, self._last(pages[0])
        tokens = to_device(torch.tensor([1 + owned[0] % 97 for owned in pages]), device)
        plain = AttentionBatch.build(
            [last] * size, [1] * size, pages, self._page_size, device, prompt_lens=[0] * size
        )
        expected = self._eager.forward(tokens, plain).clone()
        places = to_device(torch.tensor([[last] * size, list(range(size))]), device).clone()

        def compute() -> torch.Tensor:
            positions, rows = places
            batch = DeviceBatch.captured(rows, positions, self._table, self._page_size)
            return self._eager.forward(tokens, batch)

        with device_only():
            logits = graph.capture(compute)
        logits.zero_()
        graph.replay()
        error = float(relative_error(logits, expected).max())
        tolerance = _TOLERANCE[logits.dtype]
        if not error <= tolerance:
            raise CaptureError(
                f"a captured step's logits differ by {error:.2g} of their standard deviation from those of "
                f"the same step computed directly (up to {tolerance:g} is rounding)"
            )
        return _Captured(tokens, places, graph, logits)


def obstacle(eager: EagerExecutor) -> str | None:
    """Why an executor's decode steps can't be captured, part of a sentence; ``None`` if it may be tried."""
    if eager.rope is not None:
        return f"the frequencies of {eager.rope.kind} RoPE are found on the host"
    kernel = eager.attention.kernel
    if not isinstance(kernel, Capturable):
        return f"kernel {kernel.name} plans every step on the host"
    return next(filter(None, (kernel.uncapturable(pattern) for pattern, _, _ in eager.attention.alike)), None)


def batch_sizes(most: int) -> tuple[int, ...]:
    """Sizes up to ``most`` of which each is at most one and a half times the one before, 1 and 2 aside."""
    steps = {factor << power for factor in (1, 3) for power in range(most.bit_length())}
    return tuple(sorted({size for size in steps if size < most} | {most}))
