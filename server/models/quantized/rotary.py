"""Rotary angles by position."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

# Positions that a table begins with; it doubles when it must.
_FIRST = 2048


class Angles(NamedTuple):
    """Rotary angles of a batch's tokens.

    Attributes:
        cosines: float32 ``[P, D]``, contiguous, a row for each position.
        sines: likewise.
        positions: int64 ``[T]``, contiguous: the row of each token. ``None``: each has a row of its own.
    """

    cosines: torch.Tensor
    sines: torch.Tensor
    positions: torch.Tensor | None

    def by_token(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As transformers has them: ``[1, T, D]`` each."""
        if self.positions is None:
            return self.cosines[None], self.sines[None]
        return self.cosines[self.positions][None], self.sines[self.positions][None]


class OwnRotary(nn.Module):
    """The angles of a model's own module, for frequencies that depend on how long a sequence is.

    Args:
        module: of transformers; ``attention.rope`` may stand in for its forward during a step.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def at(self, positions: torch.Tensor) -> Angles:
        """The angles of tokens at ``positions``, int64 ``[T]``."""
        cosines, sines = self.module(torch.empty(0), positions[None])
        return Angles(cosines[0].contiguous(), sines[0].contiguous(), None)


class RotaryTable(nn.Module):
    """Cosines and sines of all positions reached so far, computed as transformers does and only once.

    Args:
        inv_freq: float32 ``[D / 2]``, radians per position.
        scaling: of cosines and sines.
    """

    inv_freq: torch.Tensor

    def __init__(self, inv_freq: torch.Tensor, scaling: float) -> None:
        super().__init__()
        self.scaling = scaling
        self.register_buffer("inv_freq", inv_freq)
        self._cosines = self._sines = torch.empty(0, 2 * len(inv_freq))

    def at(self, positions: torch.Tensor) -> Angles:
        """The angles of tokens at ``positions``, int64 ``[T]``."""
        positions = positions.contiguous()
        most = max(positions.tolist(), default=0)  # for few positions faster than to look for it in an array
        if most >= len(self._cosines):
            self._grow(most + 1)
        return Angles(self._cosines, self._sines, positions)

    def _grow(self, needed: int) -> None:
        have = len(self._cosines)
        cosines, sines = self.computed(torch.arange(have, max(needed, 2 * have, _FIRST)))
        self._cosines = torch.cat((self._cosines, cosines))
        self._sines = torch.cat((self._sines, sines))

    def computed(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines ``[T, D]`` of ``positions``, int64 ``[T]``; the table stays as it is."""
        angles = positions[:, None].float() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.scaling, angles.sin() * self.scaling
