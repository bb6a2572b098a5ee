"""Output tokens that a request forces: the sampler and the engine."""

from __future__ import annotations

import msgspec
import pytest
import torch

from server.engine import sampler
from server.engine.row import Row
from server.engine.sampler import read
from server.messages import FinishReason, Sampling, Submit
from tests.engine.harness import GREEDY, Outcome, load, make_core, run
from tests.engine.journal import DRAWN, PENALIZED, launched_ahead, prompts_of, told
from tests.engine.sampling import draw, logits_of, sample, state_of
from tests.models_zoo import save_tiny
from tests.stand_in_device import StandInDevice

WIDE = Sampling(seed=9, temperature=2.0, top_p=0.9)
ENGINES = {
    "at once": {},
    "ahead": {"ahead": True},
    "chunked": {"max_batch_tokens": 7, "max_running": 4},
    "short of pages": {"page_size": 4, "pages": 18, "prefix_cache": False, "ahead": True},
}


def force(request: Submit, tokens: list[int], **changes) -> Submit:
    return msgspec.structs.replace(request, forced=tokens, **changes)


def close(found: Outcome, expected: Outcome) -> bool:
    """The same tokens, and log probabilities within rounding."""
    return found.tokens == expected.tokens and all(
        here.chosen.token == there.chosen.token
        and here.chosen.logprob == pytest.approx(there.chosen.logprob, abs=1e-4)
        and [each.token for each in here.top] == [each.token for each in there.top]
        for here, there in zip(found.logprobs, expected.logprobs, strict=True)
    )


# The sampler.


def test_a_forced_row_leaves_the_others_as_they_are():
    logits = logits_of(7, 500)
    kinds = [GREEDY, *DRAWN[2:], WIDE, PENALIZED, GREEDY, WIDE]
    plain = [msgspec.structs.asdict(kind) for kind in kinds]
    free, _ = sample(logits, [Row(state_of(500, **kind), 0, 1) for kind in plain])
    rows = [
        Row(state_of(500, forced=[17 + i] if i % 2 else [], min_tokens=1, stop_token_ids=[18], **kind), 0, 1)
        for i, kind in enumerate(plain)
    ]
    tokens, logprobs = sample(logits, rows)
    assert 18 not in free
    assert tokens == [17 + i if i % 2 else free[i] for i in range(7)]
    expected = logits.log_softmax(-1)
    for i, entry in enumerate(logprobs):
        assert entry.chosen.token == tokens[i]
        assert entry.chosen.logprob == pytest.approx(float(expected[i, tokens[i]]), abs=1e-5)
        assert entry.top[0].token == int(logits[i].argmax())


def test_penalties_count_forced_tokens_and_seeds_their_positions():
    logits = torch.zeros(1, 4)
    state = state_of(4, temperature=0.0, presence_penalty=2.0, forced=[0, 1, 2])
    found = [sample(logits, [Row(state, position)])[0][0] for position in range(4)]
    assert found == [0, 1, 2, 3]
    logits = logits_of(1, 500, scale=0.1)
    free, late = state_of(500, seed=5), state_of(500, seed=5, forced=[1, 2])
    drawn = [sample(logits, [Row(free, position)])[0][0] for position in range(3)]
    assert [sample(logits, [Row(late, position)])[0][0] for position in range(3)] == [1, 2, drawn[2]]
    assert drawn[0] == draw(logits, range(5, 6))[0]


@pytest.mark.parametrize("kind", [GREEDY, WIDE])
def test_logits_without_a_finite_maximum_fail_all_the_same(kind):
    logits = logits_of(2, 50)
    logits[1, 3] = torch.nan
    states = [state_of(50, forced=[7], **msgspec.structs.asdict(kind)) for _ in range(2)]
    assert sample(logits, [Row(state, 0, 1) for state in states])[0] == [7, None]
    with pytest.raises(ValueError, match="forced names token 50; the vocabulary has tokens 0 to 49"):
        state_of(50, forced=[50])


def test_without_a_forced_token_the_tensors_are_untouched():
    tokens = torch.tensor([4, 5])
    past = state_of(50, forced=[7])
    assert sampler._force(tokens, [Row(state_of(50), 0), Row(past, 1)]) is tokens
    assert sampler._force(tokens, [Row(state_of(50), 0), Row(past, 0)]).tolist() == [4, 7]


# The engine.


@pytest.fixture(scope="module")
def free(llama):
    """Requests with sampling of every kind, three of each, and what they output."""
    requests = [
        Submit(
            id=3 * n + i,
            prompt=prompt,
            sampling=msgspec.structs.replace(kind, seed=i),
            max_tokens=12,
            logprobs=2,
        )
        for n, kind in enumerate([*DRAWN, PENALIZED, WIDE])
        for i, prompt in enumerate(prompts_of(30, 5, 18))
    ]
    return requests, run(make_core(llama), requests)


@pytest.mark.parametrize("engine", ENGINES)
def test_forcing_the_tokens_that_it_would_sample_changes_nothing(llama, free, engine):
    requests, expected = free
    for kind in range(0, len(requests), 3):
        assert len({tuple(expected[kind + i].tokens) for i in range(3)}) == 3
    forced = [force(one, expected[one.id].tokens[: 12 - 5 * (one.id % 3)]) for one in requests]
    core = make_core(llama, **ENGINES[engine])
    found = run(core, forced)
    assert all(close(found[i], expected[i]) for i in expected)
    assert all(outcome.finish is FinishReason.LENGTH for outcome in found.values())
    if engine == "short of pages":
        assert core.scheduler.preemptions > 0


@pytest.mark.parametrize("engine", ENGINES)
def test_forced_and_free_sequences_in_one_batch(llama, engine):
    """Each gets the same as without the other; forced tokens are none that the model would have sampled."""
    prompts = prompts_of(9, 30, 5, 17, 22, 3)
    kinds = [GREEDY, WIDE, *DRAWN[2:], PENALIZED, GREEDY]
    requests = [
        Submit(id=i, prompt=prompt, sampling=kind, max_tokens=11, logprobs=1, forced=own)
        for i, (prompt, kind, own) in enumerate(
            zip(prompts, kinds, [[50, 50, 51], [], [60] * 11, [], [70, 71], []], strict=True)
        )
    ]
    one_by_one = {
        request.id: run(make_core(llama, prefix_cache=False), [request])[request.id] for request in requests
    }
    found = run(make_core(llama, **ENGINES[engine]), requests)
    for request in requests:
        assert one_by_one[request.id].tokens[: len(request.forced)] == request.forced
        assert all(entry.chosen.rank > 1 for entry in one_by_one[request.id].logprobs[: len(request.forced)])
        assert close(found[request.id], one_by_one[request.id])


def test_the_output_goes_on_from_the_forced_tokens(llama):
    """As it would from a prompt that ends so; pages of forced tokens are found by later prompts."""
    (prompt,) = prompts_of(10)
    core = make_core(llama, page_size=4)
    first = run(core, [Submit(id=1, prompt=prompt, sampling=GREEDY, max_tokens=9, forced=[44, 45, 46, 47])])[
        1
    ]
    longer = Submit(id=2, prompt=[*prompt, 44, 45, 46, 47], sampling=GREEDY, max_tokens=5)
    again = run(core, [longer])[2]
    assert again.tokens == first.tokens[4:] == run(make_core(llama, prefix_cache=False), [longer])[2].tokens
    assert again.cached_tokens == 12


def test_ends_of_sequence_count_after_the_forced_tokens_only(llama):
    (prompt,) = prompts_of(10)
    base = Submit(id=1, prompt=prompt, sampling=GREEDY, max_tokens=6, forced=[44, 45, 44])
    free = run(make_core(llama), [base])[1].tokens
    assert free[:3] == [44, 45, 44]
    stopped = [
        msgspec.structs.replace(base, id=2, stop_token_ids=[44, 45]),
        msgspec.structs.replace(base, id=3, stop_token_ids=[44, free[3]]),
        msgspec.structs.replace(base, id=4, stop_token_ids=[44, free[3]], min_tokens=4),
        msgspec.structs.replace(base, id=5, stop_token_ids=[44], max_tokens=3),
    ]
    found = run(make_core(llama), stopped)
    assert (found[2].tokens, found[2].finish) == (free, FinishReason.LENGTH)
    assert (found[3].tokens, found[3].finish) == (free[:4], FinishReason.STOP)
    assert found[4].tokens[:3] == free[:3]
    assert found[4].tokens[3] not in (44, free[3])
    assert (found[5].tokens, found[5].finish) == (free[:3], FinishReason.LENGTH)


def test_steps_ahead_take_forced_tokens_on_the_device(llama, tmp_path, monkeypatch):
    """A launch waits for nothing, and no forced token takes a second look at top-p's nucleus."""
    monkeypatch.setattr(sampler, "_NUCLEUS", (2, 30))
    late: list[Row] = []

    def watched(sampled, void):
        found = read(sampled, void)
        late.extend(sampled._rows[i] for i in found.late)
        return found

    monkeypatch.setattr(sampler, "read", watched)
    requests = [
        Submit(id=i, prompt=prompt, sampling=kind, max_tokens=10, logprobs=i % 2 or None, forced=own)
        for i, (prompt, kind, own) in enumerate(
            zip(
                prompts_of(5, 12, 9, 30),
                [GREEDY, WIDE, WIDE, DRAWN[0]],
                [[50, 51] * 5, list(range(60, 70)), [], [70, 71, 72]],
                strict=True,
            )
        )
    ]
    rule = {"page_size": 4, "kernel": "sdpa"}
    expected = run(make_core(llama, **rule), requests)
    assert expected[1].tokens == requests[1].forced
    there = load(save_tiny("llama", tmp_path / "llama"))
    with StandInDevice() as device:
        there.model.to(StandInDevice.device)
        core = make_core(there, ahead=True, **rule)
        ahead = launched_ahead(core)
        launch = core.runner.launch

        def launched(scheduled, before=None):
            device.forget()
            result = launch(scheduled, before)
            assert not device.reads
            assert not device.copies
            return result

        core.runner.launch = launched
        found = run(core, requests)
    assert sum(ahead) > 20
    assert len(late) > 5
    assert all(row.forced is None for row in late)
    for number, outcome in expected.items():
        assert close(found[number], outcome)


def test_every_step_ahead_tells_the_same(llama):
    requests = [
        Submit(
            id=i, prompt=prompt, sampling=DRAWN[i % 4], max_tokens=9, logprobs=1, forced=[40 + i] * (2 * i)
        )
        for i, prompt in enumerate(prompts_of(3, 30, 5, 41))
    ]
    core = {"page_size": 4, "max_batch_tokens": 24, "max_running": 6, "prefix_cache": False}
    assert told(make_core(llama, **core, ahead=True), requests) == told(make_core(llama, **core), requests)


@pytest.mark.parametrize("ahead", [False, True])
def test_log_probabilities_are_those_of_the_same_text_as_a_prompt(llama, ahead):
    (text,) = prompts_of(64)
    prompt, forced = text[:40], [*text[40:52], 2, *text[52:]]  # with an end of sequence in between
    engine = make_core(llama, ahead=ahead, max_batch_tokens=24, max_running=8)
    request = Submit(
        id=1, prompt=prompt, sampling=GREEDY, max_tokens=25, stop_token_ids=[2], logprobs=3, forced=forced
    )
    beside = Submit(id=2, prompt=text[20:50], sampling=Sampling(seed=1, top_p=0.9), max_tokens=30)
    found = run(engine, [beside, request])[1]
    echo = run(
        make_core(llama),
        [Submit(id=3, prompt=prompt + forced, sampling=GREEDY, max_tokens=1, prompt_logprobs=3)],
    )[3]
    assert (found.tokens, found.finish) == (forced, FinishReason.LENGTH)
    assert close(found, Outcome(tokens=forced, logprobs=echo.prompt_logprobs[-25:]))
    assert sum(entry.chosen.rank > 1 for entry in found.logprobs) > 5


def test_forced_decode_is_decode_under_topk(llama):
    """It has the log probabilities of free decode, which are not those of the same tokens in a prompt."""
    (prompt,) = prompts_of(100)
    options = {"pattern": "topk", "budget": "48", "recent_pages": "1", "dense_layers": ""}
    topk = {"backend": "sparse", "options": options}
    free = Submit(id=1, prompt=prompt, sampling=GREEDY, max_tokens=8, logprobs=3)
    expected = run(make_core(llama, **topk), [free])[1]
    forced = run(make_core(llama, **topk), [force(free, expected.tokens)])[1]
    assert close(forced, expected)
    echo = Submit(id=2, prompt=prompt + expected.tokens, sampling=GREEDY, max_tokens=1, prompt_logprobs=0)
    prefill = run(make_core(llama, **topk), [echo])[2].prompt_logprobs[-8:]
    apart = [a.chosen.logprob - b.chosen.logprob for a, b in zip(forced.logprobs, prefill, strict=True)]
    assert max(map(abs, apart)) > 0.05
