"""What drafters guess, how much, and which settings make them."""

from __future__ import annotations

import pytest

from attention.backends import resolve
from server.checks import refusal
from server.engine.build import build_engine
from server.engine.speculation.acceptance import Acceptance
from server.engine.speculation.ngram import Lookup
from server.engine.speculation.own import SelfDrafter
from server.engine.speculation.timing import AGAIN, GAIN, Load, Timing
from server.messages import Submit
from server.models.executors.choose import choose_executor
from server.settings import Settings
from tests.engine.harness import greedy_requests, make_core, run
from tests.engine.harness import load as loaded_from
from tests.engine.journal import DRAWN, PENALIZED, prompts_of
from tests.models_zoo import save_tiny


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return loaded_from(save_tiny("llama", tmp_path_factory.mktemp("packed")), weights="int8")


def test_what_came_before_is_guessed_to_come_again():
    lookup = Lookup()
    assert lookup.guess([1, 2, 3, 4], 3) == ([], 0)
    assert lookup.guess([1, 2, 3, 4, 9, 2, 3], 3) == ([4, 9, 2], 2)
    assert lookup.guess([1, 2, 3, 4, 9, 2, 3, 5, 2, 3], 2) == ([5, 2], 2), "the last time counts"
    longer = Lookup().guess([7, 1, 2, 3, 4, 5, 8, 3, 4, 6, 1, 2, 3, 4], 1)
    assert longer == ([5], 4), "four tokens count before two"
    assert Lookup().guess([8, 1, 2, 1, 2], 5) == ([1, 2, 1, 2, 1], 2), "a repetition is guessed to go on"


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


class Paying(Timing):
    """As if drafting cost nothing."""

    def known(self, load):
        return True

    def least(self, load):
        return 0.2


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
