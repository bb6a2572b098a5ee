"""One step's batch, as layers and kernels receive it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attention.step import DeviceBatch, StepBatch
from attention.visible import Visible


@dataclass(frozen=True, slots=True, eq=False)
class AttentionBatch:
    """A step of which host and device both know. Built once per step and shared by all layers.

    Attributes:
        visible: the ranges that each row sees by rules over positions, with the host's part of the step.
        device: the device's part: the same rows in the same order.

    Raises:
        ValueError: the two differ in sequences, tokens or page size.
    """

    visible: Visible
    device: DeviceBatch

    def __post_init__(self) -> None:
        host, device = self.host, self.device
        rows, sequences = device.positions.shape[0], device.page_table.shape[0]
        if (rows, sequences) != (len(host.positions), host.size):
            raise ValueError("host and device know different sequences or tokens")
        if host.page_size != device.page_size:
            raise ValueError(
                f"the host has pages of {host.page_size} tokens, the device of {device.page_size}"
            )

    @property
    def host(self) -> StepBatch:
        """The host's part of the step."""
        return self.visible.host

    def advance(self, pages: Sequence[Sequence[int]]) -> None:
        """Makes a decode step, built with its prompt lengths, the same sequences' next one, in place.

        To build it would take some forty calls of numpy and torch, all of them cold. For the only owner of a
        batch in the host's memory.

        Args:
            pages: for each sequence, its pages, to which only more may have been appended.
        """
        self.visible.advance()
        self.device.advance(self.host, pages)

    @classmethod
    def build(
        cls,
        computed: Sequence[int],
        counts: Sequence[int],
        pages: Sequence[Sequence[int]],
        page_size: int,
        device: torch.device | str = "cpu",
        *,
        prompt_lens: Sequence[int] | None = None,
    ) -> AttentionBatch:
        """The step in which each sequence's next tokens are computed.

        Args:
            computed: for each sequence, its tokens whose keys are already in the cache.
            counts: for each sequence, the tokens to compute now, at least one.
            pages: for each sequence, its pages in order, enough for all of these tokens.
            page_size: tokens per page.
            device: where the tensors go.
            prompt_lens: for each sequence, the tokens that were given to it; ``None`` for all so far.

        Raises:
            ValueError: as of ``StepBatch``, or the pages are not those of as many sequences.
        """
        host = StepBatch(computed, counts, page_size, prompt_lens)
        return cls(Visible(host), DeviceBatch.of(host, pages, torch.device(device)))
