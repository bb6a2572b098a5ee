"""Rotary angles by position."""

from __future__ import annotations

from typing import NamedTuple

import torch

# Positions that a table begins with; it doubles when it must.
_FIRST = 2048


class Angles(NamedTuple):
    """Of the tokens of a batch.

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


class RotaryTable:
    """Cosines and sines of all positions reached so far, computed as transformers does and only once.

    Args:
        inv_freq: float32 ``[D / 2]``, radians per position.
        scaling: of cosines and sines.
    """

    def __init__(self, inv_freq: torch.Tensor, scaling: float) -> None:
        self._inv_freq, self._scaling = inv_freq, scaling
        self._cosines = self._sines = torch.empty(0, 2 * len(inv_freq))

    def at(self, positions: torch.Tensor) -> Angles:
        """Of tokens at ``positions``, int64 ``[T]``."""
        positions = positions.contiguous()
        most = max(positions.tolist(), default=0)  # for few positions faster than to look for it in an array
        if most >= len(self._cosines):
            self._grow(most + 1)
        return Angles(self._cosines, self._sines, positions)

    def _grow(self, needed: int) -> None:
        have = len(self._cosines)
        positions = torch.arange(have, max(needed, 2 * have, _FIRST))
        angles = positions[:, None].float() * self._inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        self._cosines = torch.cat((self._cosines, angles.cos() * self._scaling))
        self._sines = torch.cat((self._sines, angles.sin() * self._scaling))
