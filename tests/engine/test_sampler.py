"""The sampler against transformers' own logits processors, exact arithmetic, and its promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from server.engine import sampler
from server.engine.chance import uniforms
from server.engine.penalties import adjust
from server.engine.sampler import Row, SamplerState, prompt_logprobs, sample
from server.engine.types import Sampling

VOCABULARY = 49152


def logits_of(rows: int, vocabulary: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def state_of(vocabulary: int, prompt: list[int] | None = None, **kwargs) -> SamplerState:
    extra = {key: kwargs.pop(key) for key in ("min_tokens", "stop_token_ids", "output") if key in kwargs}
    return SamplerState(Sampling(**kwargs), prompt or [0], vocabulary, **extra)


def draw(logits: torch.Tensor, seeds: range, **kwargs) -> list[int]:
    """One draw per seed from one row of logits, in a batch."""
    rows = [Row(state_of(logits.shape[-1], seed=seed, **kwargs), 0) for seed in seeds]
    return sample(logits.expand(len(rows), -1), rows)[0]


def support(logits: torch.Tensor, **kwargs) -> set[int]:
    """Which tokens the filters leave, seen by the weights that the draw is made from."""
    captured = []
    original = torch.searchsorted

    def spy(cumulative: torch.Tensor, *args, **keywords) -> torch.Tensor:
        captured.append(cumulative.clone())
        return original(cumulative, *args, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler.torch, "searchsorted", spy)
        sample(logits.unsqueeze(0), [Row(state_of(logits.shape[-1], **kwargs), 0)])
    weights = torch.diff(captured[-1][0], prepend=torch.zeros(1, dtype=torch.int64))
    return set(torch.nonzero(weights).squeeze(-1).tolist())


def reference(logits: torch.Tensor, **kwargs) -> torch.Tensor:
    """Probabilities ``[V]`` by transformers' processors, in the same order."""
    scores = TemperatureLogitsWarper(kwargs.get("temperature", 1.0))(None, logits.unsqueeze(0))
    if kwargs.get("top_k", 0):
        scores = TopKLogitsWarper(kwargs["top_k"])(None, scores)
    if kwargs.get("top_p", 1.0) < 1:
        scores = TopPLogitsWarper(kwargs["top_p"])(None, scores)
    if kwargs.get("min_p", 0.0) > 0:
        scores = MinPLogitsWarper(kwargs["min_p"])(None, scores)
    return scores[0].double().softmax(-1)


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
def test_any_number_format(dtype: torch.dtype) -> None:
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
    together = generate(list(range(14)), 5000, 12)
    backwards = generate(list(range(13, -1, -1)), 5000, 12)
    rebuilt = generate(list(range(14)), 5000, 12, preempt=True)
    assert together == backwards == rebuilt
    for i in range(14):
        assert generate([i], 5000, 12) == {i: together[i]}
    assert len({tuple(tokens) for tokens in together.values()}) == 14


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
    """Rows that need 1, 300, 5,000 and all tokens for their share, in one batch and alone."""
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


def test_min_tokens_forbids_stop_tokens_until_then() -> None:
    logits = torch.tensor([[0.0, 9.0, 5.0, 1.0]])
    state = state_of(4, temperature=0.0, min_tokens=2, stop_token_ids=[1, 2, 70])
    tokens = [sample(logits, [Row(state, position)])[0][0] for position in range(4)]
    assert tokens == [3, 3, 1, 1]


def test_bias_forces_and_forbids() -> None:
    logits = logits_of(1, VOCABULARY)
    best = int(logits.argmax())
    forced = state_of(VOCABULARY, logit_bias={123: 100.0}, seed=3)
    assert sample(logits, [Row(forced, 0)])[0] == [123]
    forbidden = state_of(VOCABULARY, temperature=0.0, logit_bias={best: -100.0})
    assert sample(logits, [Row(forbidden, 0)])[0] == [int(logits[0].topk(2).indices[1])]


def test_overflowing_penalties_still_choose_the_best() -> None:
    logits = torch.tensor([[5.0, 1.0, 3e38, -3e38]])
    for temperature in (0.0, 1.0):
        state = state_of(4, [2, 3], temperature=temperature, repetition_penalty=1e-30, logit_bias={2: 100.0})
        assert sample(logits, [Row(state, 0)])[0] == [2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_give_no_token_and_harm_no_other_row(
    temperature: float, bad: float
) -> None:
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
    positions = prompt_logprobs(logits, targets, 3)
    assert len(positions) == 150
    for row, position in enumerate(positions):
        target = int(targets[row])
        assert position.chosen.token == target
        assert position.chosen.logprob == pytest.approx(float(expected[row, target]), abs=1e-5)
        assert position.chosen.rank == 1 + int((logits[row] > logits[row, target]).sum())
        assert [entry.token for entry in position.top] == logits[row].topk(3).indices.tolist()
    assert prompt_logprobs(logits[:0], targets[:0], 3) == []


def test_equal_logits_share_a_rank() -> None:
    (position,) = prompt_logprobs(torch.tensor([[1.0, 3.0, 3.0, 0.0]]), torch.tensor([0]), 4)
    assert position.chosen.rank == 3
    assert [entry.rank for entry in position.top] == [1, 1, 3, 4]


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
