"""A model's rotary embeddings under a pattern."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from attention.patterns.base import Pattern
from attention.registry import UnsupportedError
from attention.rope import LengthRope
from attention.rotation import Rotation, read_rotations
from server.models.executors.base import StepInput
from server.models.loaded import LoadedModel


def rope_in_force(rope: LengthRope | None, pattern: Pattern) -> LengthRope | None:
    """The embeddings whose frequencies depend on lengths; under a pattern of a short reach they don't count.

    Raises:
        UnsupportedError: the pattern rerotates keys whose frequencies change with the distances that its
            dense layers see.
    """
    if rope is None:
        return None
    if pattern.rerotated and pattern.reach is None:
        raise UnsupportedError(
            f"positions=cache with dense_layers doesn't go with {rope.kind} RoPE, whose frequencies "
            "change with the distances that dense layers see; leave dense_layers out or choose "
            "positions=original"
        )
    return rope.fixed() if pattern.reach is not None else rope


def rotations_of(loaded: LoadedModel, pattern: Pattern) -> dict[int, Rotation]:
    """Each layer's rotation by its index, where the pattern needs it.

    Raises:
        UnsupportedError: some layers' keys don't rotate with the position.
    """
    if not pattern.rerotated and pattern.reach is None:
        return {}
    return read_rotations(loaded.model, loaded.layers)


def lengths_of(rope: LengthRope | None, step: StepInput) -> AbstractContextManager[None]:
    """Lets the model's rotary embeddings rotate by the lengths of a step's sequences, where it matters."""
    if rope is None:
        return nullcontext()
    return rope.step(rope.lengths(step.computed, step.counts, step.prompt_lens, step.expected))
