"""The sampler's promises: greedy is cheap, a row's tokens depend on no other row, errors are told."""

from __future__ import annotations

import math

import pytest
import torch

from server.engine import sampler
from server.engine.penalties import SamplerState
from server.engine.row import Row
from server.messages import Sampling
from tests.engine.sampling import VOCABULARY, logits_of, sample, state_of


def test_greedy_is_argmax_and_changes_nothing() -> None:
    logits = logits_of(8, VOCABULARY)
    before = logits.clone()
    tokens, logprobs = sample(logits, [Row(state_of(VOCABULARY, temperature=0.0), 0) for _ in range(8)])
    assert tokens == logits.argmax(-1).tolist()
    assert logprobs == [None] * 8
    assert torch.equal(logits, before)


def test_greedy_does_no_softmax_and_no_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args, **kwargs):
        raise AssertionError("plain greedy needs only the maximum")

    monkeypatch.setattr(sampler, "_draw", forbidden)
    for name in ("sort", "topk", "exp_", "cumsum", "cumsum_", "clone"):
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    assert sample(logits, [Row(state_of(3, temperature=0.0, top_p=0.5, top_k=2), 0)])[0] == [1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_dtype(dtype: torch.dtype) -> None:
    logits = logits_of(4, 1000).to(dtype)
    rows = [Row(state_of(1000, seed=i, temperature=float(i), top_p=0.9), 0, logprobs=2) for i in range(4)]
    again = [Row(state_of(1000, seed=i, temperature=float(i), top_p=0.9), 0, logprobs=2) for i in range(4)]
    assert sample(logits, rows) == sample(logits.float(), again)


def mixed_sampling(i: int) -> Sampling:
    return [
        Sampling(temperature=0.0),
        Sampling(seed=i),
        Sampling(seed=i, temperature=0.7, top_k=20, top_p=0.9),
        Sampling(seed=i, top_p=0.95, repetition_penalty=1.3),
        Sampling(seed=i, temperature=1.5, min_p=0.05, presence_penalty=1.0, frequency_penalty=0.5),
        Sampling(temperature=0.0, repetition_penalty=1.2, logit_bias={3: 5.0, 7: -100.0}),
        Sampling(seed=i, temperature=3.0, top_p=0.99),
    ][i % 7]


def generate(which: list[int], vocabulary: int, length: int, preempt: bool = False) -> dict[int, list[int]]:
    """Tokens of the given sequences, sampled in one batch; logits depend on sequence and position only."""
    outputs: dict[int, list[int]] = {i: [] for i in which}

    def make(i: int) -> SamplerState:
        return SamplerState(
            mixed_sampling(i), [i, 1, 2], vocabulary, min_tokens=3, stop_token_ids=[0], output=outputs[i]
        )

    states = {i: make(i) for i in which}
    for position in range(length):
        logits = torch.stack([logits_of(1, vocabulary, seed=1000 * i + position)[0] for i in which])
        if preempt and position == length // 2:
            states = {i: make(i) for i in which}
        tokens, _ = sample(logits, [Row(states[i], position) for i in which])
        for i, token in zip(which, tokens, strict=True):
            outputs[i].append(token)
    return outputs


def test_tokens_do_not_depend_on_the_batch_nor_on_preemption() -> None:
    batched = generate(list(range(14)), 5000, 12)
    backwards = generate(list(range(13, -1, -1)), 5000, 12)
    rebuilt = generate(list(range(14)), 5000, 12, preempt=True)
    assert batched == backwards == rebuilt
    for i in range(14):
        assert generate([i], 5000, 12) == {i: batched[i]}
    assert len({tuple(tokens) for tokens in batched.values()}) == 14


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_logits_give_no_token_and_harm_no_other_row(temperature: float, bad: float) -> None:
    def rows() -> list[Row]:
        return [
            Row(state_of(300, temperature=temperature, top_p=0.9, top_k=280, seed=i), 0, logprobs=2)
            for i in range(3)
        ]

    logits = logits_of(3, 300)
    expected = sample(logits, rows())
    logits[1, 7] = bad
    tokens, logprobs = sample(logits, rows())
    assert tokens[1] is None
    assert logprobs[1] is None
    assert (tokens[0], tokens[2]) == (expected[0][0], expected[0][2])
    assert (logprobs[0], logprobs[2]) == (expected[1][0], expected[1][2])


def test_a_position_that_skips_tokens_is_an_error() -> None:
    state = state_of(4, temperature=0.0)
    sample(torch.eye(4)[:1], [Row(state, 0)])
    with pytest.raises(ValueError, match="output position 0, and 1 tokens are recorded"):
        sample(torch.eye(4)[:1], [Row(state, 0)])


def test_a_state_refuses_what_it_could_not_sample() -> None:
    with pytest.raises(ValueError, match="logit_bias names token 4"):
        state_of(4, logit_bias={4: 1.0})
    with pytest.raises(ValueError, match="at least one token"):
        state_of(2, min_tokens=1, stop_token_ids=[0, 1])


def test_an_unpenalized_sequence_keeps_no_counts() -> None:
    state = state_of(VOCABULARY, temperature=0.0)
    sample(logits_of(1, VOCABULARY), [Row(state, 0)])
    assert state._counts is None
    assert state._output == []


def test_no_rows() -> None:
    assert sample(torch.empty(0, 5), []) == ([], [])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_draws_what_the_cpu_draws() -> None:
    logits = logits_of(70, VOCABULARY)
    on_cpu, cpu_logprobs = sample(
        logits, [Row(SamplerState(mixed_sampling(i), [1, 2], VOCABULARY), 0, 2) for i in range(70)]
    )
    on_gpu, gpu_logprobs = sample(
        logits.cuda(), [Row(SamplerState(mixed_sampling(i), [1, 2], VOCABULARY), 0, 2) for i in range(70)]
    )
    # exp differs in its last bit between the two, which may move a boundary past a random number.
    assert sum(a != b for a, b in zip(on_cpu, on_gpu, strict=True)) <= 1
    assert [p.chosen.rank for p in cpu_logprobs[::7]] == [p.chosen.rank for p in gpu_logprobs[::7]]
