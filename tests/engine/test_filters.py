"""Temperature, top-k, top-p and min-p against transformers' own logits processors and exact arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine import sampler
from server.engine.candidates import Candidates
from server.engine.row import Row
from tests.engine.sampling import VOCABULARY, draw, logits_of, reference, sample, state_of


def support(logits: torch.Tensor, **kwargs) -> set[int]:
    """Which tokens the filters leave, seen by the weights that the draw is made from."""
    captured, found = [], []
    original, candidates = torch.searchsorted, sampler.candidates

    def spy(cumulative: torch.Tensor, *args, **keywords) -> torch.Tensor:
        captured.append(cumulative.clone())
        return original(cumulative, *args, **keywords)

    def spied(*args: torch.Tensor) -> Candidates | None:
        found.append(candidates(*args))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler.torch, "searchsorted", spy)
        patch.setattr(sampler, "candidates", spied)
        sample(logits.unsqueeze(0), [Row(state_of(logits.shape[-1], **kwargs), 0)])
    weights = torch.diff(captured[-1][0], prepend=torch.zeros(1, dtype=torch.int64))
    kept = torch.nonzero(weights).squeeze(-1)
    return set((kept if found[-1] is None else found[-1].tokens[0, kept]).tolist())


@pytest.mark.parametrize(
    "kwargs",
    [
        {"temperature": 0.3},
        {"temperature": 2.5},
        {"top_k": 1},
        {"top_k": 40},
        {"top_k": 10**6},
        {"top_p": 0.001},
        {"top_p": 0.9},
        {"top_p": 0.999, "temperature": 2.0},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
        {"temperature": 1.5, "top_k": 400, "top_p": 0.8, "min_p": 0.02},
    ],
)
@pytest.mark.parametrize("vocabulary", [17, 1000, VOCABULARY])
def test_filters_leave_what_transformers_leaves(kwargs: dict, vocabulary: int) -> None:
    logits = logits_of(1, vocabulary, seed=vocabulary)[0]
    expected = reference(logits, **{**kwargs, "top_k": min(kwargs.get("top_k", 0), vocabulary)})
    # Below 2^-40 of the most likely token, a token is never drawn.
    kept = set(torch.nonzero(expected > expected.max() * 2.0**-40).squeeze(-1).tolist())
    assert support(logits, **kwargs) == kept


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_filtered_token_is_never_drawn(data: st.DataObject) -> None:
    values = st.one_of(st.floats(-50, 50, width=32), st.sampled_from([-math.inf, -1e30, 1e30, 0.0, 3.0]))
    row = data.draw(st.lists(values, min_size=2, max_size=30))
    logits = torch.tensor(row)
    if not torch.isfinite(logits).any():
        logits[0] = 1.0
    kwargs = {
        "temperature": data.draw(st.sampled_from([1e-45, 1e-30, 0.01, 0.7, 1.0, 5.0, 1e30])),
        "top_k": data.draw(st.integers(0, 32)),
        "top_p": data.draw(st.sampled_from([1e-6, 0.1, 0.5, 0.9, 1 - 2**-24, 1.0])),
        "min_p": data.draw(st.sampled_from([0.0, 1e-6, 0.1, 0.9, 1.0])),
    }
    allowed = allowed_by_definition(logits, **kwargs)
    seed = data.draw(st.integers(0, 2**64 - 1))
    assert set(draw(logits, range(seed, seed + 20), **kwargs)) <= allowed


def allowed_by_definition(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> set[int]:
    """Tokens that may be drawn, computed in float64; those at the edge of a filter count as allowed."""
    x = logits.double()
    shares = ((x - x.max()) / max(temperature, 1e-37)).exp()
    shares[shares < 2.0**-41] = 0
    if 0 < top_k < len(x):
        shares[x < x.sort(descending=True).values[top_k - 1]] = 0
    ordered = shares.sort(descending=True).values
    enough = int((ordered.cumsum(-1) < (top_p - 1e-6) * ordered.sum()).sum())
    floor = max(float(ordered[min(enough + 1, len(x) - 1)]) if top_p > 0.99 else float(ordered[enough]), 0.0)
    kept = (shares >= floor * (1 - 1e-6)) & (shares >= min_p * (1 - 1e-6)) & (shares > 0)
    return set(torch.nonzero(kept).squeeze(-1).tolist())


@pytest.mark.parametrize("number", [0.0, 0.6, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_hit_a_token_that_is_left(
    number: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "uniforms", lambda seeds, positions: np.full(len(seeds), number))
    logits = torch.tensor([-math.inf, 1.0, -math.inf, 0.0, 1e-3, -math.inf, -math.inf])
    token = draw(logits, range(1))[0]
    assert token == {0.0: 1, 0.6: 3, 1 - 2**-53: 4}[number]


def test_equal_logits_at_the_edge_of_a_filter_stay_together() -> None:
    logits = torch.tensor([1.0, 2.0, 1.0, 0.0])
    assert support(logits, top_k=2) == {0, 1, 2}
    assert support(logits, top_p=0.6) == {0, 1, 2}
    assert support(torch.zeros(8), top_p=0.1) == set(range(8))


def test_a_wide_nucleus_beside_narrow_ones() -> None:
    """Rows that need 1, 300, 5,000 and all tokens for their share, in one batch and one by one."""
    logits = torch.full((4, VOCABULARY), -20.0)
    logits[0, 5] = 20.0
    logits[1, 100:600] = 0.0
    logits[2, 7000:15000] = 0.0
    logits[3] = 0.0
    kwargs = {"top_p": 0.6, "seed": 11}
    batch, _ = sample(logits, [Row(state_of(VOCABULARY, **kwargs), 0) for _ in range(4)])
    assert batch[0] == 5
    assert batch[1] in range(100, 600)
    assert batch[2] in range(7000, 15000)
    assert batch == [draw(row, range(11, 12), top_p=0.6)[0] for row in logits]


def test_a_nucleus_of_half_the_vocabulary() -> None:
    logits = torch.linspace(0, 2, VOCABULARY)
    shares = logits.double().softmax(-1).flip(0).cumsum(-1)
    size = int((shares < 0.5).sum()) + 1
    assert support(logits, top_p=0.5) == set(range(VOCABULARY - size, VOCABULARY))
