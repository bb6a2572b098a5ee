"""A comparison for a terminal."""

import math
import re
from dataclasses import replace

import pytest

from loadtest.compare.judge import judge
from loadtest.compare.presets import WHOLE
from loadtest.compare.words import test_words as words_of
from loadtest.deployment import Deployment
from loadtest.evaluation.types import Answer
from loadtest.report import figures, view
from tests.loadtest.synthetic import FULL, LONG, TOPK, WINDOW, draw
from tests.loadtest.usual import SIZES, text


def test_ones_own_questions_have_their_lines(usual):
    rows = [
        Answer(name, "own", 0, index, 0, None, () if free else ("x",), score=score, prompt_tokens=9)
        for name, known, agreed in (
            (FULL.name, 1.0, math.nan),
            (WINDOW.name, 0.5, 0.6),
            (TOPK.name, 1.0, 1.0),
        )
        for index in range(24)
        for free in [index % 2 == 1]
        for score in [agreed if free else known]
    ]
    plan = replace(usual.plan, own="mine.jsonl")
    own = replace(usual, plan=plan, answers=[*usual.answers, *rows])
    said = " ".join(text(own, 200).split())
    assert (
        "Your own questions, share of right answers in 12: full 1.00, window 1020 + 4 sinks 0.50, "
        "top-k 512 1.00"
    ) in said
    assert ("up to its first difference from full's in 12: window 1020 + 4 sinks 60%, top-k 512 100%") in said
    tests = {test.unit: test for test in judge(own).verdicts[0].evidence if test.measure == "own"}
    assert words_of(tests["agreement"]).startswith(
        "40% of the answers to your questions comes after their first difference from full's ("
    )
    assert "Your own questions: none asked yet" in text(replace(usual, plan=plan), 80)


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_and_has_every_figure(usual, width):
    lines = text(usual, width).splitlines()
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)
    assert [line for line in lines if line in {load.label for load in usual.plan.loads}] == [
        *("1k, 1 user, cached prompts", "4k, 1 user, cached prompts")
    ], "contexts are headings, whole at any width"
    row = next(line for line in reversed(lines) if line.startswith("top-k 512   "))
    assert row.split()[2:] == [
        "4.00",
        "1.25",
        "1.20",
        "34.0",
        "30",
        "1.010",
        re.search(r"0\.8\d", row).group(),
    ]
    assert "    --attention-option budget=512" in lines
    assert any("effective length" in line.lower() for line in lines)
    assert "sequences that 1.00 GiB of KV cache hold" in " ".join(" ".join(lines).split())
    # At 1k it computes what full attention computes: an outcome there would be of another length.
    assert len([line for line in lines if line.startswith("not safe")]) == 1


def test_how_like_the_distributions_are_is_told(usual):
    """By both figures with their intervals, at the longest context; it decides nothing."""
    rows = [
        replace(row, kl=0.03 + 0.01 * (row.block % 2), same_top=0.9 + 0.02 * (row.block % 2))
        if row.deployment == TOPK.name
        else row
        for row in usual.text
    ]
    told = replace(usual, text=rows)
    judgment = judge(told)
    (short, long) = judgment.verdicts[1].likeness
    assert (short.length, long.length) == (1024, LONG)
    assert (long.kl.value, long.same_top.value) == pytest.approx((0.035, 0.91))
    assert 0.03 < long.kl.low < 0.035 < long.kl.high < 0.04
    assert [one.outcome for one in judgment.verdicts] == [one.outcome for one in judge(usual).verdicts]
    said = text(told, 120)
    assert re.search(r"top-k 512: 91\.0% \(90\.\d% to 91\.\d%\); 0\.035 \(0\.03\d to 0\.03\d\)", said)
    shown = {row["key"]: row["cells"] for row in figures.rows(judgment, view.numbers(told))}
    assert shown["kl 1 top-k 512"][5][:2] == ("+0.035 nats", long.kl.value)
    assert shown["same 1 top-k 512"][5][0] == "91.0%"


def test_eleven_candidates_fit_too():
    widest = Deployment("sliding_window window=4096 sinks=16 positions=cache", "sliding_window")
    whole = (*WHOLE.candidates[:8], widest)
    sizes = replace(SIZES, candidates=whole, contexts=2, lengths=(LONG,), noise=0.05)
    lines = text(draw(1, sizes), 80).splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)


def test_an_empty_comparison_has_a_table(usual):
    empty = replace(usual, speed=[], answers=[], text=[], memory=[], running={}, model={}, machine={})
    assert "not enough evidence" in text(empty, 80)
    busy = judge(replace(empty, busy="this machine is too busy to tell speeds apart"))
    assert busy.verdicts[0].sentence == (
        "window 1020 + 4 sinks: not enough evidence: not measured yet: text at 1k, tasks at 1k, text at "
        "4k and tasks at 4k."
    )
    assert busy.advice.sentences[1] == (
        "There is not enough evidence of any variant's quality either; some of it was not measured at all: "
        "give a longer --budget."
    )
    assert busy.advice.sentences[2].startswith("This holds for this model with the text")
