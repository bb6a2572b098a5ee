"""What is drafted, how much of it, and which settings make the drafter."""

from __future__ import annotations

import random

import pytest

from attention.backends import resolve
from server.checks import refusal
from server.engine.build import build_engine
from server.engine.sequence import Sequence
from server.engine.speculation.acceptance import Acceptance
from server.engine.speculation.ngram import AT_ONCE, LENGTHS, MOST, Lookup, NgramDrafter
from server.engine.speculation.own import SelfDrafter
from server.engine.speculation.timing import AGAIN, GAIN, SELDOM, Load, Timing
from server.messages import Submit
from server.models.executors.choose import choose_executor
from server.settings import Settings
from tests.engine.drafting import Paying
from tests.engine.harness import greedy_requests, make_core, run
from tests.engine.journal import DRAWN, PENALIZED, prompts_of
from tests.models_zoo import save_tiny


def guessed(tokens, most, lookup=None):
    lookup = lookup or Lookup(len(tokens))
    lookup.note(tokens, len(tokens))
    return lookup.guess(tokens, most)


def test_what_came_before_is_guessed_to_come_again():
    lookup = Lookup(10)
    assert guessed([1, 2, 3, 4], 3, lookup) == ([], 0)
    assert guessed([1, 2, 3, 4, 9, 2, 3], 3, lookup) == ([4, 9, 2], 2)
    assert guessed([1, 2, 3, 4, 9, 2, 3, 5, 2, 3], 2, lookup) == ([5, 2], 2), "the last time counts"
    longer = guessed([7, 1, 2, 3, 4, 5, 8, 3, 4, 6, 1, 2, 3, 4], 1)
    assert longer == ([5], 4), "four tokens count before two"
    assert guessed([8, 1, 2, 1, 2], 5) == ([1, 2, 1, 2, 1], 2), "a repetition is guessed to go on"


def test_a_long_prompt_is_looked_through_little_by_little():
    """No step of others waits for all of it."""
    drafter = NgramDrafter(8, 100_000, None)
    sequence = Sequence(greedy_requests([list(range(4 * AT_ONCE))], 9)[0], 0)
    sequence.computed = 3 * AT_ONCE  # found in the prefix cache
    noted = []
    for _ in range(5):
        drafter.ask([sequence])
        noted.append(sequence.drafting.lookup._known)
    assert noted == [AT_ONCE, 2 * AT_ONCE, 3 * AT_ONCE, 4 * AT_ONCE, 4 * AT_ONCE]
    sequence.computed = 4 * AT_ONCE + 1
    sequence.tokens += [70, 71]
    drafter.timing = Paying()
    drafter.ask([sequence])
    assert sequence.drafting.last.guess[:3] == [72, 73, 74]


def test_guesses_are_those_of_an_index_of_all_runs():
    rng = random.Random(1)
    tokens = [rng.choice((rng.randrange(9), rng.randrange(50_000))) for _ in range(4000)]
    lookup, ends, found = Lookup(len(tokens)), {}, 0
    for total in range(1, len(tokens)):
        so_far = tokens[:total]
        lookup.note(so_far, 1)
        ends |= {tuple(so_far[total - 1 - n : total - 1]): total - 1 for n in LENGTHS if total > n}
        place = next((ends[run] for n in LENGTHS if total > n and (run := tuple(so_far[-n:])) in ends), None)
        guess, _ = lookup.guess(so_far, 1)
        assert guess == ([] if place is None else [tokens[place]])
        found += bool(guess)
    assert found > 500


def test_an_index_is_bounded_and_forgets_the_oldest():
    once = [9, 8, 7, 6]
    tokens = [*once, 5, *([1] * MOST), *once]
    lookup = Lookup(10 * MOST)
    assert lookup.nbytes <= 16 * MOST
    assert Lookup(1000).nbytes <= 32 * 1000
    assert guessed(tokens, 1, lookup) == ([], 0)
    assert guessed([*tokens[:5], *tokens[20:]], 1) == ([5], 4)


def test_more_is_drafted_the_more_often_it_is_right():
    acceptance = Acceptance(0.5)
    assert acceptance.rate == 0.5
    assert acceptance.worth(0.2) == 2
    assert acceptance.worth(0.6) == acceptance.worth(1.7) == 0
    for _ in range(20):
        acceptance.learn([1, 2, 3, 4], [1, 2, 3, 4, 5])
    assert acceptance.worth(0.2) > 8
    for _ in range(2000):
        acceptance.learn([1, 2, 3, 4], [1, 2, 3, 4, 5])
    assert 8 < acceptance.worth(0.2) <= acceptance.worth(0.0) < 1000
    before = acceptance.rate
    acceptance.learn([1, 2, 3], [])  # nothing is known of them yet
    assert acceptance.rate == pytest.approx(before)
    for _ in range(10_000):
        acceptance.learn([1, 2], [9, 2])
    assert acceptance.worth(0.2) == 0


def test_a_draft_must_be_worth_its_time(caplog):
    """Steps take 8 ms for 4 sequences, and 1 ms more for each drafted token, then 3 ms more."""
    caplog.set_level("INFO", "longspan.engine")
    timing, load = Timing(), Load(4, 1024)
    for seconds in (0.050, 0.008, 0.009, 0.008):
        assert timing.least(load) > 1, "the first steps go without"
        assert not timing.known(load)
        timing.observe(load, seconds, 0)
    assert timing.least(load) < 1
    assert not timing.known(load), "with few drafts it is tried"
    timing.observe(load, 0.012, 4)
    assert timing.known(load)
    assert timing.least(load) == pytest.approx(GAIN * 0.5)  # a token is worth 2 ms
    assert timing.least(Load(5, 1024)) > 1, "it says nothing of other loads"
    assert not caplog.records
    for _ in range(AGAIN - 2):
        timing.observe(load, 0.020, 4)
    assert timing.least(load) == pytest.approx(GAIN * 1.5)
    timing.observe(load, 0.012, 4)
    assert "drafting does not pay for 4 sequences of up to 1024 tokens in all" in caplog.text
    assert caplog.text.count("does not pay") == 1
    assert timing.least(load) > 1
    for _ in range(AGAIN):
        timing.observe(load, 0.008, 0)
    assert timing.least(load) < 1, "after a while it is tried again"
    assert not timing.known(load)


def test_trials_that_do_not_pay_become_rare():
    """Each costs a row for every sequence: with one step in 32, some percent of all time."""
    timing, load = Timing(), Load(8, 1024)

    def trials(steps, seconds):
        found = 0
        for _ in range(steps):
            drafts = 8 if timing.least(load) < 0.9 else 0
            timing.observe(load, 0.008 + drafts * seconds, drafts)
            found += drafts > 0
        return found

    assert trials(4000, 0.0012) < 14
    assert trials(SELDOM + 200, 0.0002) > 150, "it begins to pay"
    assert trials(200, 0.0012) >= 3, "and then is looked at as often as at first"


def test_a_model_drafts_for_itself(packed):
    """Under a window; tokens and log probabilities are the same to the last bit."""
    requests = [
        Submit(id=i, prompt=prompt, sampling=sampling, max_tokens=50, logprobs=2)
        for i, (prompt, sampling) in enumerate(
            zip(prompts_of(3, 61, 17, 33), [*DRAWN[:3], PENALIZED], strict=True)
        )
    ]
    plain = run(make_core(packed), requests)
    for window in (400, 12):
        core = make_core(packed)
        cache = core.runner.cache
        place = (packed.layers, "cpu", cache.dtype, cache.page_size)
        attention = resolve("sliding_window", {"window": str(window), "sinks": "2"}, "auto", *place)
        core.drafter = SelfDrafter(choose_executor(packed, attention, cache), 3, 400, None)
        core.drafter.timing = Paying()
        assert run(core, requests) == plain
        stats = core.stats()
        assert stats.draft_tokens > 50
        # A window that sees all drafts what the model samples, with penalties and randomness.
        assert (stats.accepted_draft_tokens == stats.draft_tokens) == (window == 400)


def test_the_settings_make_the_drafter(tmp_path):
    folder = save_tiny("llama", tmp_path)
    given = {"device": "cpu", "weights": "int8", "kv_memory": "8MiB", "threads": 1, "speculate": "self"}
    options = {"draft_tokens": 3, "draft_attention_option": {"window": "8", "sinks": "0"}}
    core, ready = build_engine(Settings(**given, **options), folder, lambda stage, fraction: None)
    assert isinstance(core.drafter, SelfDrafter)
    assert (ready.speculation.method, ready.speculation.draft_tokens) == ("self", 3)
    assert ready.speculation.attention_backend == "sliding_window"
    assert ready.speculation.attention_options["window"] == "8"
    core.drafter.timing = Paying()
    assert len(run(core, greedy_requests(prompts_of(40), 20))[1].tokens) == 20
    assert core.stats().draft_tokens > 0


def test_settings_of_drafts_without_drafting_are_refused():
    assert "nothing is drafted without --speculate" in refusal(Settings(draft_tokens=3))
    for name, value in (("draft_attention", "sparse"), ("draft_attention_option", {"window": "8"})):
        sentence = refusal(Settings(**{name: value}, speculate="ngram"))
        assert sentence.startswith(f"--{name.replace('_', '-')}: attention drafts with --speculate self only")
    assert "did you mean" in refusal(Settings(speculate="self", draft_attention="sliding_windw"))
    assert refusal(Settings(speculate="self", draft_attention_option={"window": "8"})) is None
