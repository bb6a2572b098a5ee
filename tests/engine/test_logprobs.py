"""Logprobs and ranks of sampled tokens, the most likely ones and those of a prompt."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attention.transfer import AsyncCopy
from server.engine.logprobs import measure, prompt_logprobs
from server.engine.row import Row
from tests.engine.sampling import logits_of, sample, state_of


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = logits_of(3, 1000, seed=2)
    sampling = {"temperature": 0.2, "top_k": 3, "repetition_penalty": 2.0, "logit_bias": {5: 100.0}}
    rows = [
        Row(state_of(1000, **sampling), 0, logprobs=4),
        Row(state_of(1000, temperature=0.0), 0),
        Row(state_of(1000, seed=9), 0, logprobs=0),
    ]
    tokens, logprobs = sample(logits, rows)
    expected = logits.double().log_softmax(-1)
    assert logprobs[1] is None
    assert logprobs[0] is not None
    assert logprobs[2] is not None
    assert tokens[0] == 5
    for i in (0, 2):
        chosen = logprobs[i].chosen
        assert chosen.token == tokens[i]
        assert chosen.logprob == pytest.approx(float(expected[i, tokens[i]]), abs=1e-5)
        assert chosen.rank == 1 + int((logits[i] > logits[i, tokens[i]]).sum())
    best = logits[0].topk(4)
    assert [entry.token for entry in logprobs[0].top] == best.indices.tolist()
    assert [entry.rank for entry in logprobs[0].top] == [1, 2, 3, 4]
    assert logprobs[2].top == []


def test_prompt_logprobs_over_many_rows() -> None:
    logits = logits_of(150, 500, seed=4)
    targets = torch.randint(500, (150,), generator=torch.Generator().manual_seed(1))
    expected = logits.double().log_softmax(-1)
    positions = prompt_logprobs(AsyncCopy(measure(logits, targets, 3)))
    assert len(positions) == 150
    for row, position in enumerate(positions):
        target = int(targets[row])
        assert position.chosen.token == target
        assert position.chosen.logprob == pytest.approx(float(expected[row, target]), abs=1e-5)
        assert position.chosen.rank == 1 + int((logits[row] > logits[row, target]).sum())
        assert [entry.token for entry in position.top] == logits[row].topk(3).indices.tolist()


def test_equal_logits_share_a_rank() -> None:
    measured = measure(torch.tensor([[1.0, 3.0, 3.0, 0.0]]), torch.tensor([0]), 4)
    (position,) = prompt_logprobs(AsyncCopy(measured))
    assert position.chosen.rank == 3
    assert [entry.rank for entry in position.top] == [1, 1, 3, 4]


class _Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else [result]:
            if isinstance(made, torch.Tensor):
                self.elements = max(self.elements, made.numel())
        return result


def test_many_of_the_most_likely_take_no_more_memory_than_the_logits() -> None:
    logits = logits_of(2, 3000, seed=3)
    with _Largest() as largest:
        measured = measure(logits, torch.zeros(2, dtype=torch.int64), 3000)
    assert largest.elements == logits.numel()
    assert measured.top_ranks[0].tolist() == list(range(1, 3001))
