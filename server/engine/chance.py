"""Random numbers that depend on a request's seed and a token's position and on nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """One number in [0, 1) for each pair of seed and output position, 53 random bits each.

    Position ``p`` gets output ``p`` of the SplitMix64 generator (Steele, Lea and Flood: Fast Splittable
    Pseudorandom Number Generators, OOPSLA 2014) that starts at the hash of the seed. Nothing is kept
    between calls, so neither the batch nor a preemption can change a sequence's numbers.

    Args:
        seeds: any integers; their lowest 64 bits count.
        positions: how many tokens each sequence has output so far.

    Returns:
        float64 ``[B]``.
    """
    start = _mix(np.array([seed & _MASK for seed in seeds], dtype=np.uint64) + _GAMMA)
    bits = _mix(start + (np.array(positions, dtype=np.uint64) + np.uint64(1)) * _GAMMA)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
