"""Bias, penalties and a least number of tokens against a plain reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    RepetitionPenaltyLogitsProcessor,
)

from server.engine.penalties import SamplerState, adjust
from server.engine.row import Row
from server.messages import Sampling
from tests.engine.sampling import VOCABULARY, logits_of, sample, state_of


def reference_adjusted(
    logits: torch.Tensor, sampling: Sampling, prompt: list[int], output: list[int], banned: list[int]
) -> torch.Tensor:
    """One row's logits after bias and penalties, token by token."""
    scores = logits.clone()
    for token, bias in sampling.logit_bias.items():
        scores[token] += bias
    seen = torch.tensor([prompt + output])
    scores = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(seen, scores.unsqueeze(0))[0]
    for token in set(output):
        scores[token] -= sampling.presence_penalty + sampling.frequency_penalty * output.count(token)
    scores[banned] = -torch.inf
    return scores


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_bias_and_penalties_equal_the_plain_reference(data: st.DataObject) -> None:
    vocabulary = data.draw(st.integers(4, 40))
    tokens = st.integers(0, vocabulary - 1)
    size = data.draw(st.integers(1, 5))
    logits = logits_of(size, vocabulary, seed=data.draw(st.integers(0, 1000)))
    states, positions, expected = [], [], []
    for row in range(size):
        sampling = Sampling(
            repetition_penalty=data.draw(st.sampled_from([1.0, 1.3, 0.5])),
            presence_penalty=data.draw(st.sampled_from([0.0, 1.5, -2.0])),
            frequency_penalty=data.draw(st.sampled_from([0.0, 0.7, -0.3])),
            logit_bias=data.draw(st.dictionaries(tokens, st.sampled_from([-100.0, -1.0, 2.0, 100.0]))),
        )
        prompt = data.draw(st.lists(tokens, min_size=1, max_size=8))
        output = data.draw(st.lists(tokens, max_size=8))
        stops = data.draw(st.lists(tokens, max_size=2))
        least = data.draw(st.integers(0, 8))
        kept = data.draw(st.integers(0, len(output)))
        state = SamplerState(
            sampling, prompt, vocabulary, min_tokens=least, stop_token_ids=stops, output=output[:kept]
        )
        if data.draw(st.booleans()):
            state.counts(logits.device)
        for token in output[kept:]:
            state.record(token)
        states.append(state)
        positions.append(len(output))
        banned = stops if len(output) < least else []
        expected.append(reference_adjusted(logits[row], sampling, prompt, output, banned))
    before = logits.clone()
    actual = adjust(logits, states, positions)
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits, before)


def test_tokens_that_are_not_recorded_yet_count() -> None:
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    penalties = {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.25}
    outputs, known = ([4, 4], [2, 7, 7, 3, 7], []), (1, 1, 0)
    recorded = [state_of(9, [1], output=list(output), **penalties) for output in outputs]
    lacking = [
        state_of(9, [1], output=output[:count], **penalties)
        for output, count in zip(outputs, known, strict=True)
    ]
    positions = [len(output) for output in outputs]
    further = [
        torch.tensor(output[count:]) if output else None for output, count in zip(outputs, known, strict=True)
    ]
    assert torch.equal(adjust(logits, lacking, positions, further), adjust(logits, recorded, positions))
    assert lacking[0].output_length == 1
    with pytest.raises(ValueError, match="after 2 output tokens, and 1 are known"):
        adjust(logits, lacking, positions)


def test_min_tokens_forbids_stop_tokens_until_then() -> None:
    logits = torch.tensor([[0.0, 9.0, 5.0, 1.0]])
    state = state_of(4, temperature=0.0, min_tokens=2, stop_token_ids=[1, 2, 70])
    tokens = [sample(logits, [Row(state, position)])[0][0] for position in range(4)]
    assert tokens == [3, 3, 1, 1]


def test_what_a_request_names_becomes_tensors_once(monkeypatch):
    """A step must not handle each entry of ``logit_bias`` again."""
    logits = logits_of(2, VOCABULARY)
    bias = dict.fromkeys(range(50), -1.0)
    states = [
        state_of(VOCABULARY, logit_bias=bias, min_tokens=5, stop_token_ids=range(60, 90)),
        state_of(VOCABULARY, logit_bias={3: 2.0}),
    ]
    first = adjust(logits, states, [0, 0])
    made = []
    tensor = torch.tensor
    monkeypatch.setattr(
        torch, "tensor", lambda values, **options: made.append(len(values)) or tensor(values, **options)
    )
    assert torch.equal(adjust(logits, states, [0, 0]), first)
    assert max(made) <= len(states)
    assert torch.equal(first[1], logits[1] + 2.0 * (torch.arange(VOCABULARY) == 3))


def test_bias_forces_and_forbids() -> None:
    logits = logits_of(1, VOCABULARY)
    best = int(logits.argmax())
    forced = state_of(VOCABULARY, logit_bias={123: 100.0}, seed=3)
    assert sample(logits, [Row(forced, 0)])[0] == [123]
    forbidden = state_of(VOCABULARY, temperature=0.0, logit_bias={best: -100.0})
    assert sample(logits, [Row(forbidden, 0)])[0] == [int(logits[0].topk(2).indices[1])]


def test_overflowing_penalties_still_take_the_most_likely() -> None:
    logits = torch.tensor([[5.0, 1.0, 3e38, -3e38]])
    for temperature in (0.0, 1.0):
        state = state_of(4, [2, 3], temperature=temperature, repetition_penalty=1e-30, logit_bias={2: 100.0})
        assert sample(logits, [Row(state, 0)])[0] == [2]
