"""Readings of documents as candidates of a comparison, beside attention variants."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

from loadtest.compare import document
from loadtest.compare.answering import answering
from loadtest.compare.judge import judge
from loadtest.compare.plan import Asked, PlanError, make_plan
from loadtest.compare.preflight import _divided
from loadtest.compare.schema import FILE
from loadtest.compare.types import Comparison, Outcome
from loadtest.compare.units import Unit, lacking
from loadtest.deployment import FULL, Deployment, parse
from loadtest.report.compare import render
from loadtest.tasks.registry import TASKS
from tests.loadtest.synthetic import LONG, WINDOW, Sizes, Truth, draw
from tests.loadtest.test_compare_loop import World
from tests.loadtest.usual import text

READING = Deployment("extractive", "extractive")
FAR = 16_384
SIZES = Sizes(
    blocks=24, tokens=4, contexts=16, tasks=("needles",), lengths=(LONG,), candidates=(FULL, WINDOW, READING)
)


def drawn(reading: Truth, sizes: Sizes = SIZES) -> Comparison:
    """A comparison with a length that the model's context does not hold, and the rows that there can be."""
    found = draw(3, replace(sizes, lengths=(LONG, FAR)), extractive=reading)
    found.plan = replace(
        found.plan,
        contexts=(LONG,),
        beyond=(FAR,),
        loads=tuple(load for load in found.plan.loads if load.context == LONG),
    )

    def there(row: object, name: str, length: int) -> bool:
        return name != READING.name and length == LONG

    found.text = [row for row in found.text if there(row, row.deployment, row.length)]
    found.memory = [row for row in found.memory if there(row, row.deployment, row.length)]
    labels = {load.label for load in found.plan.loads}
    found.speed = [row for row in found.speed if row.deployment != READING.name and row.load in labels]
    found.answers = [
        replace(row, seconds=2.5, logprob=math.nan)
        if row.deployment == READING.name
        else replace(row, seconds=0.5)
        for row in found.answers
        if row.deployment == READING.name or row.length == LONG
    ]
    del found.running[READING.name]
    return found


def test_a_reading_is_named_as_for_longspan_read() -> None:
    found = parse("extractive top=8 passage_tokens=256")
    assert found.is_reading
    options = found.read_options()
    assert (options.method, options.top, options.citations) == (
        "extractive",
        8,
        0,
    )
    assert found.command == (
        "longspan read FILE --question QUESTION --method extractive --top 8 --passage-tokens 256"
    )
    assert not parse("sliding_window window=512").is_reading


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            "extractive window=3",
            "extractive has no option window; it has passage_tokens, overlap, top, max_tokens",
        ),
        ("map-reduce top=3", "map-reduce has no option top; it has passage_tokens, overlap, max_tokens"),
        ("hierarchical overlap=few", "hierarchical: overlap=few is not a whole number"),
        ("map-reduce passage_tokens=4", "passage_tokens is 4; it must be at least 32"),
        ("whole", "whole is how full attention reads, which is always there"),
    ],
)
def test_a_reading_that_cant_be_is_refused(words: str, sentence: str) -> None:
    with pytest.raises(PlanError, match=re.escape(sentence)):
        make_plan(Asked(candidates=[words]))


def test_lengths_beyond_the_models_context_are_for_readings_only() -> None:
    plan, _ = make_plan(Asked(contexts=[512, 1024, 4096], candidates=["extractive"]))
    divided = _divided(plan, "model", 1024)
    assert (divided.contexts, divided.beyond) == ((512, 1024), (4096,))
    assert {load.context for load in divided.loads} == {512, 1024}
    assert divided.lengths("extractive") == (512, 1024, 4096)
    assert divided.lengths("full") == (512, 1024)
    with pytest.raises(PlanError, match="give a --context that it holds too"):
        _divided(plan, "model", 500)
    without, _ = make_plan(Asked(contexts=[512, 4096], candidates=["flash"]))
    with pytest.raises(PlanError, match="or add a reading, like --candidate extractive"):
        _divided(without, "model", 1024)


def test_each_candidate_is_asked_what_it_can_answer() -> None:
    empty = replace(drawn(Truth()), answers=[], text=[], memory=[])
    everything = {FULL.name, WINDOW.name, READING.name}
    assert lacking(Unit("answers", LONG, 0, "needles"), empty) == everything
    assert lacking(Unit("answers", FAR, 0, "needles"), empty) == {READING.name}
    assert lacking(Unit("memory", LONG), empty) == everything - {READING.name}
    assert lacking(Unit("answers", 0, 0, "own"), empty) == everything - {READING.name}


@pytest.mark.parametrize(("truth", "outcome"), [(Truth(), Outcome.SAFE), (Truth(lost=0.5), Outcome.UNSAFE)])
def test_a_reading_is_judged_by_its_answers(truth: Truth, outcome: Outcome) -> None:
    found = drawn(truth)
    judgment = judge(found)
    verdict = judgment.verdicts[1]
    assert verdict.outcome is outcome
    assert {test.measure for test in verdict.evidence} == {"tasks", "task:needles"}
    assert {test.length for test in verdict.evidence} == {LONG}, (
        "beyond it there is nothing to hold it against"
    )
    assert "At 4k a question takes 2.50 s, under full attention 0.50 s" in verdict.sentence
    assert "perplexity" not in verdict.sentence
    assert verdict.command == "longspan read FILE --question QUESTION --method extractive"
    assert judgment.advice.winner != READING.name, "it is no server to deploy"


def test_few_contexts_make_no_reading_safe() -> None:
    assert judge(drawn(Truth(), replace(SIZES, contexts=4))).verdicts[1].outcome is Outcome.UNKNOWN


def test_where_full_attention_fails_no_reading_is_safe() -> None:
    verdict = judge(drawn(Truth(), replace(SIZES, score=0.05))).verdicts[1]
    assert verdict.outcome is Outcome.UNKNOWN
    assert "where full attention itself fails" in verdict.sentence


def test_beyond_the_context_only_readings_have_a_score() -> None:
    found = drawn(Truth())
    full, window, reading = answering(found, FAR)
    assert (full.fits, window.fits, reading.fits) == (False, False, True)
    assert reading.score.claimed
    assert reading.score.low < reading.score.value < 1
    few = replace(found, answers=[row for row in found.answers if row.length == LONG or row.index < 3])
    assert 0 <= answering(few, FAR)[-1].score.low < reading.score.low, "a share, of however few contexts"
    sentences = " ".join(judge(found).advice.sentences)
    assert "At 16k no attention variant can be asked, since the model's context is 8k; of the" in sentences
    assert re.search(
        r"readings extractive finds 0\.8\d \(0\.\d+ to 0\.\d+\) of 192 answers at 2\.50 s", sentences
    )


def test_the_table_has_both_kinds_beside_each_other() -> None:
    lines = text(drawn(Truth()), 80).splitlines()
    assert max(map(len, lines)) <= 80
    at = lines.index("4k, questions")
    row = next(line for line in lines[at:] if line.startswith("extractive")).split()
    assert row[2:] == ["192", "2.50", "n/a"]
    far = lines[lines.index("16k, questions") :]
    assert (
        next(line for line in far if line.startswith("full")).split(maxsplit=1)[1].strip() == "does not fit"
    )
    speeds = lines[:at]
    assert not any(line.startswith("extractive") for line in speeds), "it has no speed per token"


def test_the_page_and_the_document_have_them(tmp_path: Path) -> None:
    found = drawn(Truth())
    page = render(found, judge(found))
    assert "Attention and reading" in page
    assert page.count("does not fit") == 2
    assert page.count("not applicable") == 2
    document.save(found, tmp_path / "c.json")
    written = json.loads((tmp_path / "c.json").read_text())
    jsonschema.validate(written, json.loads(FILE.read_text()))
    again = document.load(tmp_path / "c.json")
    assert again.plan.beyond == (FAR,)
    assert {row.seconds for row in again.answers} == {0.5, 2.5}
    joined = document.join(
        replace(found, plan=replace(found.plan, beyond=(32_768,)), answers=[]), tmp_path / "c.json"
    )
    assert joined.plan.beyond == (FAR, 32_768)


def test_comparisons_without_readings_are_shown_as_before() -> None:
    plain = draw(3, replace(SIZES, candidates=(FULL, WINDOW)))
    assert "questions\n" not in text(plain, 80)
    assert "Attention and reading" not in render(plain, judge(plain))


def test_a_reading_takes_no_server_and_no_round_of_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, sizes=replace(SIZES, rounds=0))
    comparison, _ = world.compare(1_000.0)
    assert world.opened == [[FULL.name, WINDOW.name]]
    assert READING.name not in {row.deployment for row in comparison.speed}
    assert READING.name in {row.deployment for row in comparison.answers}
    assert set(TASKS) >= {row.task for row in comparison.answers}
