"""A draw among a row's candidates gives the token that a draw among the whole vocabulary gives."""

import pytest
import torch

from server.engine import sampler
from server.engine.candidates import candidates
from server.engine.row import Row
from tests.engine.sampling import logits_of, sample, state_of

WAYS = [
    {"temperature": 0.2, "top_p": 0.9},
    {"temperature": 0.7},
    {"temperature": 0.5, "top_k": 50},
    {"temperature": 0.5, "top_k": 20_000},
    {"temperature": 0.4, "min_p": 0.05},
    {"temperature": 0.3, "top_p": 0.999, "top_k": 300, "min_p": 1e-4},
    {"temperature": 1e-6},
    {"temperature": 1e-30, "top_p": 0.5},
]


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_tokens_are_the_same(rows, monkeypatch):
    for trial in range(6):
        logits = logits_of(rows, 5001, seed=trial)
        logits[0, 1000:2000] = logits[0].max()  # as likely as each other
        ways = [
            Row(state_of(5001, seed=trial * 100 + i, **WAYS[(i + trial) % len(WAYS)]), 0) for i in range(rows)
        ]
        narrow, _ = sample(logits, ways)
        narrower, _ = sample(logits[-1:], [Row(state_of(5001, **_own(ways[-1])), 0)])
        with monkeypatch.context() as patched:
            patched.setattr(sampler, "candidates", lambda *_: None)
            again = [Row(state_of(5001, **_own(row)), 0) for row in ways]
            assert sample(logits, again)[0] == narrow
        assert narrower == narrow[-1:]  # in any company


def _own(row):
    sampling = row.state.sampling
    return {name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k", "min_p", "seed")}


def test_no_token_with_a_weight_is_left_out():
    logits = torch.tensor([[1e6, 1e6 - 0.0625, 3.0, -torch.inf] * 200, [30.0, 2.2, 2.4, 1.0] * 200])
    found = candidates(logits[:, :80].repeat(1, 10), torch.tensor([1e6, 30.0]), torch.tensor([1e-3, 1.0]))
    assert found is None  # too many
    logits[:, 4:] = -50.0
    logits[0, 790] = 1e6
    few = candidates(logits, torch.tensor([1e6, 30.0]), torch.tensor([1e-3, 1.0]))
    assert few.logits.shape == few.tokens.shape == (2, 64)
    assert few.tokens[0, :2].tolist() == [0, 790]
    assert few.tokens[1, :3].tolist() == [0, 1, 2]
    assert few.logits[0, 2:].max() == -torch.inf


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_a_row_without_a_finite_maximum_has_no_token(wrong):
    logits = logits_of(3, 5000)
    logits[1] = wrong if wrong < 0 else logits[1]
    logits[1, 77] = wrong
    rows = [Row(state_of(5000, temperature=0.3, top_p=0.8, seed=i), 0) for i in range(3)]
    tokens, _ = sample(logits, rows)
    assert tokens[1] is None
    assert tokens[0] is not None
    assert tokens[2] is not None
    alone = [Row(state_of(5000, temperature=0.3, top_p=0.8, seed=1), 0)]
    assert sample(logits[1:2], alone)[0] == [None]
