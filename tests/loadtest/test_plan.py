"""The requests of a load test, and their times."""

import itertools
import json
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.load.measures import summarize
from loadtest.load.sweep import Sweep
from loadtest.load.types import ClosedLoop, OpenLoop
from loadtest.load.workloads import WORKLOADS, Shape, WorkloadError, from_file
from loadtest.measuring.arrivals import arrival_times
from loadtest.measuring.records import Record

SHAPE = Shape(sessions=40, prompt_tokens=60, output_tokens=20, vocabulary=5000, context=4096, seed=3)


@given(st.integers(1, 50), st.floats(0.01, 1000), st.floats(0.1, 10) | st.just(math.inf), st.integers(0, 99))
def test_arrivals_are_in_order_and_repeatable(count, rate, burstiness, seed):
    times = arrival_times(count, rate, burstiness, seed)
    assert len(times) == count
    assert times[0] == 0
    assert times == sorted(times) == arrival_times(count, rate, burstiness, seed)


@pytest.mark.parametrize(("burstiness", "variation"), [(0.25, 2.0), (1.0, 1.0), (4.0, 0.5), (math.inf, 0.0)])
def test_gaps_have_the_rate_and_the_burstiness_asked_for(burstiness, variation):
    times = arrival_times(20_000, 50.0, burstiness, 1)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert statistics.pstdev(gaps) * 50 == pytest.approx(variation, rel=0.05, abs=1e-6)


@pytest.mark.parametrize("arguments", [(0.0, 1.0), (-1.0, 1.0), (math.inf, 1.0), (1.0, 0.0), (1.0, math.nan)])
def test_rates_that_make_no_sense_are_refused(arguments):
    with pytest.raises(ValueError, match="makes no sense"):
        arrival_times(3, *arguments, seed=0)


@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads_follow_their_seed(name):
    sessions = WORKLOADS[name](SHAPE)
    assert [session.index for session in sessions] == list(range(40))
    assert sessions == WORKLOADS[name](SHAPE)
    other = WORKLOADS[name](Shape(40, 60, 20, 5000, 4096, seed=4))
    assert sessions != other


def test_lengths():
    def lengths(name):
        turns = [session.turns[0] for session in WORKLOADS[name](SHAPE)]
        return [len(turn.prompt) for turn in turns], [turn.output_tokens for turn in turns]

    assert lengths("fixed") == ([60] * 40, [20] * 40)
    prompts, outputs = lengths("long-context")
    assert all(30 <= length <= 60 for length in prompts)
    assert len(set(prompts)) > 10
    assert outputs == [20] * 40
    big = Shape(4000, 100_000, 100_000, 5000, 1_000_000)
    turns = [session.turns[0] for session in WORKLOADS["sharegpt"](big)]
    assert statistics.mean(len(turn.prompt) for turn in turns) == pytest.approx(161, rel=0.1)
    assert statistics.mean(turn.output_tokens for turn in turns) == pytest.approx(338, rel=0.1)


def test_prefixes_are_shared_by_turns():
    shape = Shape(9, 10, 5, 5000, 4096, groups=3, prefix_tokens=50)
    prompts = [session.turns[0].prompt for session in WORKLOADS["shared-prefix"](shape)]
    assert {len(prompt) for prompt in prompts} == {60}
    assert prompts[0][:50] == prompts[3][:50] == prompts[6][:50]
    assert len({tuple(prompt[:50]) for prompt in prompts}) == 3
    assert len({tuple(prompt[50:]) for prompt in prompts}) == 9


def test_conversations_are_of_text():
    (session, *_) = WORKLOADS["multi-turn"](SHAPE)
    assert len(session.turns) == 4
    for turn in session.turns:
        ((role, content),) = turn.prompt
        assert role == "user"
        assert len(content) == 240


def test_prompts_that_do_not_fit_the_context_are_refused():
    with pytest.raises(WorkloadError, match=r"60 tokens and an output of 20 don't fit .* context of 70"):
        WORKLOADS["fixed"](Shape(1, 60, 20, 5000, 70))


def test_a_file_of_prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "hello"},
        {"token_ids": [1, 2], "output_tokens": 7},
        {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]},
        {"turns": ["one", "two"]},
    ]
    file.write_text("\n\n".join(map(json.dumps, lines)))
    sessions = from_file(file, SHAPE)
    assert len(sessions) == 40
    assert [turn.prompt for turn in sessions[4].turns] == ["hello"]
    assert (sessions[1].turns[0].prompt, sessions[1].turns[0].output_tokens) == ([1, 2], 7)
    assert sessions[2].turns[0].prompt == [("system", "be brief"), ("user", "hi")]
    assert [turn.prompt for turn in sessions[3].turns] == [[("user", "one")], [("user", "two")]]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "has no lines"),
        ("{", "line 1: is not JSON"),
        ('{"prompt": "a"}\n{"prompt": 3}', "line 2: prompt must be a text"),
        ('{"prompt": "a", "turns": []}', "exactly one of messages, prompt, token_ids, turns"),
        ('{"token_ids": [1, -2]}', "line 1: prompt must be"),
        ('{"messages": [{"role": "user"}]}', "line 1: prompt must be"),
        ('{"prompt": "a", "output_tokens": 0}', "output_tokens is 0"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path, text, sentence):
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    with pytest.raises(WorkloadError, match=sentence):
        from_file(file, SHAPE)


def _outcome(users: int, capacity: float):
    """A server that answers ``capacity`` requests a second at most, each in a second when it is idle."""
    rate = min(users, capacity)
    latency = users / rate
    ends = [index / rate for index in range(20)]
    return summarize(
        [Record(i, 0, end, end, [(end + latency, 5)], end + latency) for i, end in enumerate(ends)]
    )


def test_a_sweep_ends_where_the_server_is_full_and_goes_back():
    sweep = Sweep(256)
    loads = []
    for load in sweep:
        loads.append(load)
        sweep.add(_outcome(load.concurrency if isinstance(load, ClosedLoop) else 1, 10.0))
    closed = [load.concurrency for load in loads if isinstance(load, ClosedLoop)]
    assert closed == [1, 2, 4, 8, 16]
    rates = [load.rate for load in loads if isinstance(load, OpenLoop)]
    most = max(_outcome(users, 10.0).request_rate for users in closed)
    assert rates == pytest.approx([most * share for share in (0.25, 0.5, 0.75, 0.9)])


def test_a_sweep_ends_at_the_most_users():
    sweep = Sweep(4)
    for load in sweep:
        sweep.add(_outcome(getattr(load, "concurrency", 1), 1e9))
    assert len(sweep._summaries) == 3 + 4


def test_a_sweep_of_a_server_that_answers_nothing_ends():
    sweep = Sweep(256)
    loads = []
    for load in sweep:
        loads.append(load)
        sweep.add(summarize([Record(0, 0, 0.0, 0.0, [], 1.0, code="UNAVAILABLE", error="no")]))
    assert loads == [ClosedLoop(1)]


def test_random_prompts_leave_special_tokens_out():
    ids = {id_ for session in WORKLOADS["fixed"](SHAPE) for id_ in session.turns[0].prompt}
    assert min(ids) >= 1000
    assert max(ids) < 5000
    small = Shape(40, 60, 20, 300, 4096, seed=random.randrange(99))
    assert all(150 <= id_ < 300 for session in WORKLOADS["fixed"](small) for id_ in session.turns[0].prompt)
