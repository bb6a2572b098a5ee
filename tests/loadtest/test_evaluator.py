"""Units of an evaluation: their order, and their results on real servers."""

import itertools
import math
from dataclasses import replace

import pytest

from loadtest.compare import analysis
from loadtest.compare.evaluator import Evaluator
from loadtest.compare.types import Comparison, Plan
from loadtest.compare.units import Rows, Unit, lacking, order
from loadtest.deployment import FULL, parse, topk, window
from loadtest.evaluation.text import Tokens, slices
from loadtest.evaluation.types import Answer, Memory, TextBlock
from loadtest.tasks.types import Sample
from loadtest.texts import prose, reference
from longspan import Client
from tests.loadtest.within import within

pytestmark = pytest.mark.long

NEAR = window(60, 4)
FIT, BEYOND = 320, 700  # tokens of a context that both hold, and of one that is longer than that
LATE = replace(NEAR, name="late")
TEXT = prose(reference())


def comparison(candidates=(FULL, NEAR), contexts=(FIT,), tasks=("needles",), **others):
    return Comparison(Plan(candidates, contexts, (), tasks, "made up", "", **others), "", {})


def own(*answers):
    return [
        Sample("own", "Rivers run to the sea.\n", "Where do rivers run?", "", answer, 8, "", 0, turn=turn)
        for turn, answer in enumerate(answers)
    ]


SETTINGS = {"kv_memory": "128MiB", "max_context": 400, "threads": 1}


@pytest.fixture(scope="module")
def full(default_model):
    with within(FULL, **SETTINGS) as running:
        yield running


@pytest.fixture(scope="module")
def clients(full):
    with (
        within(NEAR, **SETTINGS) as near,
        full.client() as asks_full,
        near.client() as asks_near,
    ):
        yield {FULL.name: asks_full, NEAR.name: asks_near}


def test_a_whole_round_gives_the_rows_of_the_analysis(clients):
    found = comparison()
    questions = own(("sea",), ())
    evaluator = Evaluator(
        found, clients[FULL.name], text=TEXT, prose=TEXT, own=questions, turns=3, contexts=1
    )
    units = list(itertools.islice(evaluator.units(), 4))
    assert units == [
        Unit("text", FIT),
        Unit("memory", FIT),
        Unit("answers", FIT, 0, "needles"),
        Unit("answers", 0, 0, "own"),
    ]
    for unit in units:
        before = evaluator.cost(unit)
        evaluator.run(unit, clients).add_to(found)
        assert before > 0
        assert evaluator.cost(unit) == 0
        assert evaluator.cost(replace(unit, index=1)) > 0 or unit.kind != "answers"
    assert found.failed == {}
    assert not analysis.errors(found, FULL.name) + analysis.errors(found, NEAR.name)
    assert [(row.deployment, row.turn) for row in found.answers if row.task == "needles"] == [
        (name, turn) for name in clients for turn in range(3)
    ]
    assert analysis.full_score(found, "needles", FIT).count == 3
    assert all(row.logprob < 0 for row in found.answers if row.task == "needles")
    assert analysis.text_loss(found, NEAR.name, FIT).count == 2, "blocks"
    assert analysis.text_loss(found, NEAR.name, FIT).value > 0, "the real model needs what a window hides"
    assert all(0.5 < row.same_top < 1 for row in found.text if row.deployment == NEAR.name)
    assert analysis.text_kl(found, NEAR.name, FIT).value > 0.001
    assert analysis.text_loss(found, FULL.name, FIT).value == 0
    full, near = found.memory
    assert full.bytes > 3 * near.bytes
    rows = [row for row in found.answers if row.task == "own"]
    assert [math.isnan(row.score) for row in rows] == [False, True, False, False]
    assert 0 <= rows[3].score <= 1
    assert analysis.agreement_loss(found, NEAR.name).count == 1
    assert not set(units) & set(evaluator.units())
    # A candidate that comes later is asked by itself, except where full attention's tokens are needed again.
    found.plan = replace(found.plan, candidates=(*found.plan.candidates, LATE))
    late = Evaluator(found, clients[FULL.name], text=TEXT, prose=TEXT, own=questions, turns=3, contexts=1)
    alive = {**clients, LATE.name: clients[NEAR.name]}
    asked = {unit: late.run(unit, alive) for unit in late.units() if unit.index == 0}
    assert list(asked) == units
    assert {row.deployment for row in asked[units[2]].answers} == {LATE.name}
    assert [row.deployment for row in asked[units[1]].memory] == [LATE.name]
    assert {row.deployment for row in asked[units[3]].answers} == {FULL.name, LATE.name}
    asked[units[0]].add_to(found)
    assert analysis.text_kl(found, LATE.name, FIT) == analysis.text_kl(found, NEAR.name, FIT)


def test_a_server_that_has_ended_is_named(clients):
    found = comparison((FULL, NEAR, topk(128)))
    evaluator = Evaluator(found, clients[FULL.name], text=TEXT, prose=TEXT, contexts=1)
    unit = Unit("memory", FIT)
    with Client(port=1, timeout=5) as gone:
        rows = evaluator.run(unit, {**clients, topk(128).name: gone})
        assert [row.deployment for row in rows.memory] == list(clients)
        assert list(rows.failed) == [topk(128).name]
        rows.add_to(found)
        assert not lacking(unit, found)
        lost = evaluator.run(Unit("text", FIT), {**clients, FULL.name: gone})
    assert list(lost.failed) == [FULL.name]
    assert not lost.text
    with pytest.raises(ValueError, match="without a server of 'full'"):
        evaluator.run(unit, {NEAR.name: clients[NEAR.name]})


@pytest.mark.parametrize(
    ("text", "length", "message"),
    [
        (
            "Rain falls on the hills. " * 20,
            512,
            "but a context of 512 needs 512; give a longer text",
        ),
        (TEXT, 140, "needles needs at least .* take a longer context or leave out the task"),
    ],
)
def test_a_text_or_context_that_is_too_short_is_refused_before_measuring(clients, text, length, message):
    with pytest.raises(ValueError, match=message):
        Evaluator(comparison(contexts=(length,)), clients[FULL.name], text=text, prose=TEXT)


def test_every_length_gets_its_share_of_each_round():
    text = Tokens((), tuple(range(2500)))
    parts = {length: slices(text, length, 0) for length in (500, 1000)}
    units = list(order((500, 1000), ("a", "b"), parts, own=range(10), most=3))
    assert len(units) == len(set(units)) == 5 + 2 + 2 + 2 * 2 * 3 + 10
    first = units[: units.index(Unit("answers", 1000, 1, "a"))]
    assert first == [
        Unit("text", 500),
        Unit("memory", 500),
        Unit("answers", 500, 0, "a"),
        Unit("answers", 500, 0, "b"),
        Unit("text", 1000),
        Unit("memory", 1000),
        Unit("answers", 1000, 0, "a"),
        Unit("answers", 1000, 0, "b"),
        Unit("answers", 0, 0, "own"),
        Unit("answers", 0, 1, "own"),
    ]
    longest = [unit.index for unit in units if (unit.length, unit.task) == (1000, "a")]
    assert longest == [0, 1, 2]
    endless = order((500,), ("a",), parts)
    assert next(itertools.islice(endless, 500, None)).index > 400
    many = list(order((500, 1000), ("a",), {500: [], 1000: []}, most=9))
    assert [unit.index for unit in many if (unit.kind, unit.length) == ("answers", 1000)] == [*range(9)]
    sixth = many.index(Unit("answers", 1000, 5, "a"))
    assert Unit("answers", 500, 1, "a") not in many[:sixth], "the longest is ahead until it has six"


def test_rows_take_the_place_of_older_ones():
    found = comparison()
    for score in (0.0, 1.0):
        answer = Answer("full", "a", 512, 0, 0, None, ("x",), score=score)
        block, held = TextBlock("full", 512, 3, 400, (-score,)), Memory("full", 512, score)
        Rows([answer], [block], [held]).add_to(found)
    Rows([Answer("full", "a", 512, 0, 1, None, ("x",))]).add_to(found)
    assert (len(found.answers), found.text, found.memory) == (2, [block], [held])
    assert found.answers[0].score == 1


def test_a_reading_answers_what_the_models_context_does_not_hold(clients, full):
    """The real model finds most numbers in a document twice as long as its context."""
    reading = parse("extractive passage_tokens=128 top=2 max_tokens=24")
    found = comparison((FULL, NEAR, reading), beyond=(BEYOND,))
    address = (full.host, full.port)
    evaluator = Evaluator(
        found, clients[FULL.name], text=TEXT, prose=TEXT, turns=3, contexts=1, address=address
    )
    alive = {**clients, reading.name: clients[FULL.name]}
    for length in (FIT, BEYOND):
        evaluator.run(Unit("answers", length, 0, "needles"), alive).add_to(found)
    assert [(row.deployment, row.length) for row in found.answers] == [
        *((name, FIT) for name in (FULL.name, NEAR.name, reading.name) for _ in range(3)),
        *((reading.name, BEYOND) for _ in range(3)),
    ]
    assert not any(row.error for row in found.answers)
    assert all(row.seconds > 0 for row in found.answers)
    far = [row for row in found.answers if row.length == BEYOND]
    assert all(row.prompt_tokens > BEYOND for row in far), "every passage was looked at"
    assert sum(row.score for row in far) >= 2
    assert not evaluator.due(Unit("text", FIT), [reading.name])
