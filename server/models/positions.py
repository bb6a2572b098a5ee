"""Positions of tokens that are not those of one text: an encoder-decoder's own count from 0 in each call.

Its halves have either a module ``embed_positions``, whose vectors are added to the tokens', or biases by
distance in their attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_NAME = "embed_positions"


class GivenPositions(nn.Module):
    """Stands for ``embed_positions`` and gives the vectors of the positions that it is told.

    Args:
        table: ``[N, d]``, by position.

    Attributes:
        positions: int64 ``[T]``, of the next call's tokens.
    """

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = table
        self.positions = torch.empty(0, dtype=torch.int64)

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        """``[1, T, d]``."""
        return self.table[self.positions][None]


class _FoundError(Exception):
    """Ends a forward whose first part is all that is wanted."""


def has_table(half: nn.Module) -> bool:
    """Whether vectors of positions are added to the tokens of an encoder or decoder."""
    return isinstance(getattr(half, _NAME, None), nn.Module)


def give_positions(half: Any, length: int) -> GivenPositions | None:
    """Lets the caller say the positions of an encoder's or decoder's tokens.

    Args:
        half: the encoder or the decoder of a model of transformers.
        length: positions that it has.

    Returns:
        The object that takes them; ``None`` where they are in no module of this name.
    """
    if not has_table(half):
        return None
    given = GivenPositions(_table(half, length))
    setattr(half, _NAME, given)
    return given


@torch.inference_mode()
def _table(half: Any, length: int) -> torch.Tensor:
    """The vectors ``[length, d]`` that the half's own module gives a text's tokens."""
    found: list[torch.Tensor] = []

    def note(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        found.append(output)
        raise _FoundError

    hook = getattr(half, _NAME).register_forward_hook(note)
    # Any token but the padding, which has no position of its own.
    token = 1 if half.config.pad_token_id != 1 else 2
    try:
        half(input_ids=torch.full((1, length), token, device=half.device))
    except _FoundError:
        pass
    finally:
        hook.remove()
    return found[0].reshape(length, -1)


def share_biases(half: nn.Module, length: int, *, causal: bool) -> None:
    """Has attention modules hand on a table of their biases, in place of those of one text's pairs.

    Args:
        half: the encoder or the decoder of a model of transformers.
        length: positions that it has, at most.
        causal: the table has the biases back to earlier tokens only.
    """
    for module in half.modules():
        if isinstance(getattr(module, "relative_attention_bias", None), nn.Embedding):
            table = _bias_table(module, length, causal=causal)
            module.compute_bias = _Constant(table)  # type: ignore[assignment]


class _Constant:
    """A function of anything."""

    def __init__(self, value: torch.Tensor) -> None:
        self._value = value

    def __call__(self, *_: Any, **__: Any) -> torch.Tensor:
        return self._value


@torch.inference_mode()
def _bias_table(module: Any, length: int, *, causal: bool) -> torch.Tensor:
    """``[H, N]`` by distance back, or ``[H, 2 N - 1]``: of a key ``d`` later at ``N - 1 + d``."""
    back: torch.Tensor = module.compute_bias(1, length, past_seen_tokens=length - 1)[0, :, 0]
    if causal:
        return back.flip(-1).contiguous()
    ahead: torch.Tensor = module.compute_bias(1, length)[0, :, 0]
    return torch.cat([back, ahead[:, 1:]], dim=-1).contiguous()
