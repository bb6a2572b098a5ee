"""Where a variant computes the same as full attention, and the consequences."""

from dataclasses import replace

import pytest
import torch

from attention.patterns import sparse as sparse_patterns
from attention.patterns.sliding_window import SlidingWindow
from loadtest.compare.equal import covers, equal_pairs, equal_work
from loadtest.compare.judge import judge
from loadtest.compare.types import Outcome
from loadtest.deployment import Deployment, sparse
from loadtest.measuring.types import Load
from tests.loadtest.synthetic import DECODE, EQUAL, FEW, FULL, LONG, PROMPT, TOPK, WINDOW, Truth, draw


def test_an_exact_backend_is_safe_unless_it_is_broken():
    flash = Deployment("flash", "flash")
    sizes = replace(FEW, candidates=(FULL, flash))
    assert judge(draw(1, sizes)).verdicts[0].outcome is Outcome.SAFE
    assert not any(test.decides for test in judge(draw(1, sizes)).verdicts[0].evidence)
    broken = judge(draw(1, sizes, flash=Truth(nats=0.2))).verdicts[0]
    assert broken.outcome is Outcome.UNSAFE
    assert "this is a fault" in broken.sentence


def test_a_context_that_a_variant_covers_needs_no_test():
    sizes = replace(FEW, lengths=(1024,), candidates=(FULL, WINDOW))
    verdict = judge(draw(1, sizes, window=EQUAL)).verdicts[0]
    assert verdict.outcome is Outcome.SAFE
    assert not any(test.decides for test in verdict.evidence)


@pytest.mark.parametrize(
    ("attention", "options", "most"),
    [
        ("sliding_window", {"window": "1020", "sinks": "4", "positions": "original"}, 1024),
        ("sparse", {"pattern": "longformer", "window": "512", "global_tokens": "16"}, 528),
        ("sparse", {"pattern": "segment", "segment": "512", "sinks": "4"}, 1024),
        ("sparse", {"pattern": "bigbird", "block": "64", "window_blocks": "3", "random_blocks": "0"}, 256),
        ("sparse", {"pattern": "lsh", "window": "128", "sinks": "4", "buckets": "128"}, 132),
        ("sparse", {"pattern": "topk", "budget": "512"}, 512),
        ("sparse", {"pattern": "oracle", "budget": "512"}, 512),
    ],
)
def test_covered_contexts_by_the_pattern_itself(attention, options, most):
    assert covers(attention, options, most)
    assert not covers(attention, options, most + 1)
    if options.get("pattern") in ("topk", "oracle"):
        return
    pattern = (SlidingWindow if attention == "sliding_window" else sparse_patterns).from_options(options)
    for tokens, whole in ((most, True), (most + 1, False)):
        at = torch.arange(tokens)
        seen = pattern.visible(at[:, None], at[None])
        if options.get("pattern") == "lsh":  # what it sees for certain
            seen = (at[None] < 4) | (at[:, None] - at[None] < 128)
        assert bool((seen | (at[None] > at[:, None])).all()) == whole


def test_equal_work():
    drawn = draw(1, replace(FEW, lengths=(512, LONG), candidates=(FULL, TOPK, WINDOW, sparse("x", "new"))))
    short, long = replace(DECODE, context=512), DECODE
    assert equal_work(drawn, TOPK.name, short, "tpot")
    assert not equal_work(drawn, TOPK.name, long, "tpot")
    assert equal_work(drawn, TOPK.name, PROMPT, "ttft"), "prompts are computed densely"
    assert not equal_work(drawn, WINDOW.name, PROMPT, "ttft")
    assert not equal_work(drawn, TOPK.name, Load(LONG, 64, concurrency=8), "ttft"), "others decode beside it"
    assert not equal_work(drawn, "x", short, "tpot"), "of an unknown pattern nothing is known"
    assert {pair.first for pair in equal_pairs(drawn)} == {FULL.name}
    assert {(pair.second, pair.load.split(",")[0]) for pair in equal_pairs(drawn)} == {
        (TOPK.name, "512"),
        (WINDOW.name, "512"),
    }
    assert equal_work(drawn, WINDOW.name, short, "tpot")
    drawn.running[WINDOW.name]["options"]["positions"] = "cache"
    assert not equal_work(drawn, WINDOW.name, short, "tpot"), "its keys are rotated as they are read"
    drawn.running[TOPK.name]["kernel"] = "sdpa"
    assert not equal_work(drawn, TOPK.name, short, "tpot"), "another kernel"
    drawn.running.clear()
    assert not equal_work(drawn, WINDOW.name, short, "tpot"), "options in force are not known"
