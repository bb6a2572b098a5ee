"""The rows of a batch of logits: whose next token is sampled, and what is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from attention.transfer import to_device
from server.engine.penalties import SamplerState


class Row(NamedTuple):
    """One row of a batch of logits.

    Attributes:
        state: its sequence's.
        position: how many tokens the sequence has output.
        logprobs: ``None`` for none, else how many of the most likely tokens beside the sampled one.
        unrecorded: the tokens before it that are not recorded yet; see ``adjust``.
        follows: the drafted token before it, where the row before it is of the same sequence: this row counts
            only if that one counts and gets this token.
    """

    state: SamplerState
    position: int
    logprobs: int | None = None
    unrecorded: torch.Tensor | None = None
    follows: int | None = None

    @property
    def forced(self) -> int | None:
        """Its forced token, if it has one."""
        return self.state.forced(self.position)

    @property
    def drawn(self) -> bool:
        """Whether its token is drawn at random."""
        return not self.state.sampling.greedy and self.forced is None

    @property
    def plainly_greedy(self) -> bool:
        """Whether only the most likely token by its logits as they come is asked for."""
        return (
            self.logprobs is None
            and self.state.sampling.greedy
            and not self.state.adjusts(self.position)
            and self.forced is None
        )


def take(x: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """The given rows; ``x`` itself, uncopied, where they are all."""
    return x if len(rows) == len(x) else x[to_device(torch.tensor(rows), x.device)]


def put(x: torch.Tensor, rows: Sequence[int], values: torch.Tensor) -> None:
    """Sets the given rows, in place."""
    x[to_device(torch.tensor(rows), x.device)] = values
