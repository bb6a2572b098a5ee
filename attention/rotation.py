"""Rotary position embeddings applied once more: rotates keys or queries by further positions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from attention.forward import LayerCall, forward
from attention.kernels.base import layer_ranges
from attention.registry import UnsupportedError
from attention.types import LayerSpec

# The largest difference of a rerotated key from the one computed at that position, relative to the largest
# number in the keys: rounding errors, the model's own rounding of cosines and sines included.
_TOLERANCE = {torch.float32: 2e-3, torch.float16: 0.01, torch.bfloat16: 0.05}

_PROBE_TOKENS = (1, 2, 3, 5)
_PROBE_POSITIONS = (0, 1, 2, 7, 30, 31, 100, 511)


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """How a layer rotates its queries and keys (Su et al.: RoFormer, 2021, section 3.2.2).

    Pairs of numbers are rotated by ``position * frequency``, so a further rotation by the same rule moves a
    key or a query to another position. A factor on cosines and sines, as in YaRN and LongRoPE, is already in
    the numbers and must not be applied again: a rotation keeps lengths.

    Attributes:
        frequencies: radians per position, float64 ``[F]``, one for each pair.
        interleaved: pairs are ``(0, 1), (2, 3), ...``; else ``(0, F), (1, F + 1), ...``.
        start: where in the head the ``2 * F`` rotated numbers begin; the others stay as they are.
    """

    frequencies: torch.Tensor
    interleaved: bool = False
    start: int = 0

    @property
    def size(self) -> int:
        """How many numbers of a head are rotated."""
        return 2 * len(self.frequencies)

    def angles(self, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines for ``rotate_by``, float32 ``[T, F]`` each.

        Args:
            shift: positions to rotate by, integers ``[T]``; negative ones rotate back.
        """
        angles = shift.to(torch.float64)[:, None] * self.frequencies.to(shift.device)
        return angles.cos().float(), angles.sin().float()

    def rotate_by(self, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """``rotate``, from cosines and sines."""
        cos, sin = (part[:, None] for part in angles)
        rotated = x[..., self.start : self.start + self.size].float()
        pairs = rotated.unflatten(-1, (-1, 2)) if self.interleaved else rotated.unflatten(-1, (2, -1))
        axis = -1 if self.interleaved else -2
        first, second = pairs.unbind(axis)
        rerotated = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=axis)
        output = x.clone()
        output[..., self.start : self.start + self.size] = rerotated.flatten(-2).to(x.dtype)
        return output

    def rotate(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """Keys or queries as they would be ``shift`` positions later.

        Args:
            x: ``[T, H, D]``, after RoPE.
            shift: integers ``[T]``; negative ones rotate back.

        Returns:
            ``[T, H, D]`` in the dtype of ``x``.
        """
        return self.rotate_by(x, self.angles(shift))


def read_rotations(model: Any, layers: list[LayerSpec]) -> dict[int, Rotation]:
    """Each layer's rotation, by its index; layers that rotate alike share one.

    Each is proven: keys of the same token at different positions, with no other tokens to attend to, must be
    rotations of each other. If a model has other frequencies for long sequences, these are those of short
    ones.

    Args:
        model: a causal language model of transformers whose attention implementation is ``longspan``.
        layers: its attention layers.

    Raises:
        UnsupportedError: some layers' keys don't rotate with the position.
    """
    device = next(model.parameters()).device
    text = model.config.get_text_config(decoder=True)
    lengths = (getattr(text, name, None) for name in ("max_position_embeddings", "max_target_positions"))
    own = next(filter(None, lengths), max(_PROBE_POSITIONS) + 1)
    positions = torch.tensor([p for p in _PROBE_POSITIONS if p < min(own, _steady(text))], device=device)
    tokens = torch.tensor(_PROBE_TOKENS, device=device) % text.vocab_size
    recorder = _Recorder()
    with torch.inference_mode():
        forward(
            model,
            tokens.repeat_interleave(len(positions)),
            positions.repeat(len(tokens)),
            recorder,
            torch.zeros(1, dtype=torch.long, device=device),
        )
    found: dict[int, Rotation] = {}
    lost = []
    for layer in layers:
        keys = recorder.keys[layer.index].unflatten(0, (len(tokens), len(positions)))
        known = list(dict.fromkeys(found.values()))
        fitting = (r for r in (*known, *_candidates(model, layer)) if _proven(r, keys, positions))
        if (rotation := next(fitting, None)) is None:
            lost.append(layer)
        else:
            found[layer.index] = rotation
    if lost:
        raise UnsupportedError(
            f"positions=cache needs keys that rotate with their position (RoPE), and those of "
            f"{layer_ranges(lost)} of {type(model).__name__} don't; choose positions=original"
        )
    return found


class _Recorder:
    """Lets every token attend only to itself and records the keys.

    Attributes:
        keys: by layer, ``[T, Hkv, D]``.
    """

    def __init__(self) -> None:
        self.keys: dict[int, torch.Tensor] = {}

    def attend(self, call: LayerCall) -> torch.Tensor:
        """See ``attention.forward.Attend.attend``."""
        module, query, key, value, *_ = call
        # The layer may reuse this memory.
        self.keys[module.layer_idx] = key[0].transpose(0, 1).clone()
        repeats = query.shape[1] // value.shape[1]
        return value.repeat_interleave(repeats, dim=1).transpose(1, 2).contiguous()


def _steady(text: Any) -> int:
    """The length up to which frequencies do not depend on it under any kind of scaling."""
    parameters = getattr(text, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    originals = [each.get("original_max_position_embeddings") for each in (parameters, *nested)]
    return min((int(each) for each in originals if each), default=max(_PROBE_POSITIONS) + 1)


def _candidates(model: Any, layer: LayerSpec) -> Iterator[Rotation]:
    """Every frequency table in the model, in both layouts, at both ends of the head."""
    for module in model.modules():
        for name, table in module.named_buffers(recurse=False):
            if not name.endswith("inv_freq") or "original" in name or table.ndim != 1:
                continue
            rest = layer.head_size - 2 * len(table)
            if rest < 0:
                continue
            for start in dict.fromkeys([0, rest]):
                for interleaved in (False, True):
                    yield Rotation(table.double(), interleaved, start)


def _proven(rotation: Rotation, keys: torch.Tensor, positions: torch.Tensor) -> bool:
    """Whether ``keys`` ``[N, P, Hkv, D]`` at ``positions`` ``[P]`` are rotations of each other."""
    if rotation.start + rotation.size > keys.shape[-1]:
        return False
    first = keys[:, :1].expand_as(keys).flatten(0, 1)
    rerotated = rotation.rotate(first, (positions - positions[0]).repeat(len(keys)))
    largest = float(keys.abs().max())
    error = float((rerotated.float() - keys.flatten(0, 1).float()).abs().max())
    return largest > 0 and error <= _TOLERANCE[keys.dtype] * largest
