"""Draws by seed and position: their distribution, and the random numbers that they are made from."""

from __future__ import annotations

import math

import numpy as np
import pytest

from server.engine.chance import uniforms
from tests.engine.sampling import draw, logits_of, reference


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1, "temperature": 1.7}],
)
def test_draws_follow_the_distribution(kwargs: dict) -> None:
    logits = logits_of(1, 50, seed=5, scale=1.5)[0]
    expected = reference(logits, **kwargs).numpy()
    draws = 10_000
    counts = np.bincount(draw(logits, range(draws), **kwargs), minlength=50)
    likely = expected * draws >= 5
    observed = np.append(counts[likely], counts[~likely].sum())
    wanted = np.append(expected[likely], expected[~likely].sum()) * draws
    statistic = ((observed - wanted)[wanted > 0] ** 2 / wanted[wanted > 0]).sum()
    freedom = int((wanted > 0).sum()) - 1
    # Five standard deviations of chi-square; the seeds are fixed, so this either always passes or never.
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)
    assert counts[expected == 0].sum() == 0


def test_draws_of_one_seed_follow_the_distribution_over_positions() -> None:
    numbers = uniforms([1234] * 100_000, range(100_000))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 99 + 5 * math.sqrt(198)
    pairs = np.corrcoef(numbers[:-1], numbers[1:])[0, 1]
    neighbors = np.corrcoef(numbers, uniforms([1235] * 100_000, range(100_000)))[0, 1]
    assert abs(pairs) < 0.015
    assert abs(neighbors) < 0.015


def test_uniforms_are_splitmix64_from_the_hashed_seed() -> None:
    mask = (1 << 64) - 1

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    assert mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF, "the published first output for seed 0"
    for seed, position in [(0, 0), (mask, 7), (1 << 63, 10**6), (-1, 7)]:
        state = mix((seed & mask) + 0x9E3779B97F4A7C15 & mask)
        bits = mix(state + (position + 1) * 0x9E3779B97F4A7C15 & mask)
        assert uniforms([seed], [position])[0] == (bits >> 11) / 2**53
