"""The document of a comparison: it comes back as it was, is joined or refused, and is of its schema."""

import csv as reader
import json
import math
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

from loadtest.compare import csv, document, schema
from loadtest.compare.judge import judge
from loadtest.compare.plan import Asked, make_plan
from loadtest.compare.types import Margins
from loadtest.deployment import topk
from loadtest.document import DocumentError, plain
from loadtest.evaluation.types import Answer, Memory, TextBlock
from loadtest.measuring.types import Measurement, Weather
from tests.loadtest.synthetic import FULL, TOPK, WINDOW, Sizes, Truth, draw

SIZES = Sizes(blocks=8, tokens=2, contexts=2, turns=4, rounds=6)


@pytest.fixture
def comparison():
    drawn = draw(1, SIZES, topk=Truth(nats=0.01, speed=1.3), window=Truth(lost=0.5))
    drawn.speed.append(Measurement(TOPK.name, "x", 0, 0, 2, 1.5, 0.1, {"tpot": math.nan}, Weather(math.nan)))
    drawn.failed = {WINDOW.name: "it fell over"}
    return drawn


def test_a_saved_comparison_comes_back(comparison, tmp_path):
    file = tmp_path / "c.json"
    document.save(comparison, file)
    again = document.load(file)
    assert plain(again) == plain(comparison)
    assert math.isnan(again.speed[-1].weather.stolen)
    assert math.isnan(again.text[0].kl)
    assert judge(again) == judge(comparison)
    assert json.loads(file.read_text())["judgment"] == plain(judge(comparison))
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"], "nothing else is left"


def test_it_is_of_its_schema_and_every_field_is_described(comparison, tmp_path):
    file = tmp_path / "c.json"
    document.save(comparison, file)
    written = json.loads(schema.FILE.read_text())
    assert written == schema.schema(), "run python -m loadtest.compare.schema"
    jsonschema.Draft202012Validator.check_schema(written)
    validator = jsonschema.Draft202012Validator(written)
    whole = json.loads(file.read_text())
    validator.validate(whole)
    parts = [part for part in written["$defs"].values() if part.get("type") == "object"]
    assert len(parts) > 10
    assert all(entry["description"] for part in [written, *parts] for entry in part["properties"].values())
    assert all(part["additionalProperties"] is False for part in [written, *parts])
    del whole["answers"][0]["predicted_answer"]
    whole["plan"]["depths"] = []
    messages = {error.message.split("'")[1] for error in validator.iter_errors(whole)}
    assert messages == {"predicted_answer", "depths"}


def test_a_file_of_before_rounds_were_set_aside_is_read(comparison, tmp_path):
    file = tmp_path / "c.json"
    document.save(comparison, file)
    whole = json.loads(file.read_text())
    for row in whole["speed"]:
        del row["set_aside"]
    del whole["busy"], whole["plan"]["tasks_version"]
    for verdict in whole["judgment"]["verdicts"]:
        del verdict["effective_least"], verdict["effective_most"]
        for test in verdict["evidence"]:
            del test["turns"]
    jsonschema.Draft202012Validator(schema.schema()).validate(whole)
    whole["judgment"]["busy"] = ""
    file.write_text(json.dumps(whole))
    assert plain(document.load(file)) == plain(comparison)


def test_a_file_with_other_questions_under_the_same_keys_is_refused(comparison, tmp_path):
    file = tmp_path / "c.json"
    document.save(comparison, file)
    plan, _ = make_plan(Asked(contexts=comparison.plan.contexts))
    assert plan.tasks_version > comparison.plan.tasks_version == 1
    now = replace(comparison, plan=replace(comparison.plan, tasks_version=plan.tasks_version))
    with pytest.raises(DocumentError, match=r"the version of the tasks \(1 there, 2 now\)"):
        document.join(now, file)


def test_a_second_run_goes_on(comparison, tmp_path):
    file = tmp_path / "c.json"
    comparison.answers.append(Answer(TOPK.name, "vt", 4096, 9, 0, None, ("x",), error="it fell over"))
    document.save(comparison, file)
    new = replace(
        comparison, speed=[], text=[], memory=[], answers=comparison.answers[:1], spent=60.0, failed={}
    )
    joined = document.join(new, file)
    assert joined.plan == comparison.plan
    assert joined.spent == comparison.spent + 60
    assert len(joined.answers) == len(comparison.answers), "what failed is measured again, and one is new"
    assert not any(row.error for row in joined.answers)
    assert not joined.failed
    assert document.join(comparison, tmp_path / "none.json") is comparison


def test_a_machine_that_was_too_busy_is_so_when_its_run_goes_on(comparison, tmp_path):
    file = tmp_path / "c.json"
    comparison.speed = [replace(row, disturbed="another process used 48%") for row in comparison.speed]
    document.save(comparison, file)
    joined = document.join(replace(comparison, speed=[], answers=[], text=[], memory=[], failed={}), file)
    assert "too busy to tell speeds apart" in joined.busy
    assert judge(joined).advice.winner == ""


def test_memory_that_is_free_now_does_not_keep_a_run_from_going_on(comparison, tmp_path):
    """A server sizes its KV memory by the free memory; sequences are counted for the file's size."""
    file = tmp_path / "c.json"
    document.save(comparison, file)
    now = replace(comparison, plan=replace(comparison.plan, kv_memory=comparison.plan.kv_memory - 2**20))
    assert document.join(now, file).plan == comparison.plan


def test_a_whole_comparison_adds_to_a_quick_one(comparison, tmp_path):
    file = tmp_path / "c.json"
    document.save(comparison, file)
    more = replace(
        comparison.plan,
        candidates=(FULL, topk(256), TOPK),
        contexts=(4096, 8192),
        loads=tuple(replace(load, context=8192) for load in comparison.plan.loads[:2]),
        tasks=("cwe",),
    )
    plan = document.join(replace(comparison, plan=more, answers=[]), file).plan
    assert [one.name for one in plan.candidates] == ["full", WINDOW.name, TOPK.name, "top-k 256"]
    assert plan.contexts == (1024, 4096, 8192)
    assert [load.context for load in plan.loads] == [1024, 1024, 4096, 4096, 8192, 8192]
    assert plan.tasks == ("needles", "vt", "cwe")
    assert plan.loads[4].cached, "the operator's own load stays the first of its context"


def test_another_minutes_free_memory_is_no_other_condition(comparison, tmp_path):
    file = tmp_path / "c.json"
    document.save(comparison, file)
    counted = comparison.plan.kv_memory
    less = replace(comparison, plan=replace(comparison.plan, kv_memory=counted // 2))
    assert document.join(less, file).plan.kv_memory == counted > 0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seed": 7}, "the seed (0 there, 7 now)"),
        ({"chat": True}, "whether questions are asked through the chat template (False there, True now)"),
        (
            {"arguments": ("--weights", "float")},
            "arguments of longspan serve (none there, --weights float now)",
        ),
        ({"margins": Margins(perplexity=0.1)}, "the margins"),
        (
            {"candidates": (replace(FULL, others=("--weights", "float")), TOPK)},
            "of the others (longspan serve --attention full there, longspan serve --attention full --weights",
        ),
        ({"candidates": (FULL, replace(TOPK, options={"pattern": "lsh"}))}, "candidate top-k 512 (longspan"),
    ],
)
def test_other_conditions_are_refused_by_name(comparison, tmp_path, changes, sentence):
    file = tmp_path / "c.json"
    document.save(comparison, file)
    with pytest.raises(document.DocumentError) as refused:
        document.join(replace(comparison, plan=replace(comparison.plan, **changes)), file)
    assert sentence in str(refused.value)
    assert "name another file, or run as before" in str(refused.value)


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("machine", {"cpu": "pencil", "cores": 2}, "the machine's cpu (abacus there, pencil now)"),
        ("model", {"name": "other"}, "the model's name (SmolLM2-135M-Instruct there, other now)"),
        ("versions", {"torch": "2"}, "the version of torch (1 there, 2 now)"),
    ],
)
def test_other_places_are_refused_too(comparison, tmp_path, field, value, sentence):
    file = tmp_path / "c.json"
    comparison.versions = {"torch": "1"}
    document.save(comparison, file)
    with pytest.raises(document.DocumentError) as refused:
        document.join(replace(comparison, **{field: value}), file)
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "can't be read"),
        ('{"schema": "longspan-compare/1"}', "is of schema longspan-compare/1"),
        ('{"schema": "longspan-load/2"}', "is not a longspan-compare document"),
        ('{"schema": "longspan-compare/2"}', "is damaged: Object missing required field `plan`; remove it"),
    ],
)
def test_other_documents_are_refused(tmp_path, content, sentence):
    file = tmp_path / "c.json"
    file.write_text(content)
    with pytest.raises(document.DocumentError) as refused:
        document.load(file)
    assert sentence in str(refused.value)


def test_a_damaged_field_is_named(comparison, tmp_path):
    file = tmp_path / "c.json"
    document.save(comparison, file)
    whole = json.loads(file.read_text())
    whole["plan"]["contexts"] = ["long"]
    file.write_text(json.dumps(whole))
    with pytest.raises(document.DocumentError, match=r"got `str` - at `\$\.plan\.contexts"):
        document.load(file)


def test_rows_as_csv(comparison, tmp_path):
    comparison.answers = [
        Answer(TOPK.name, "vt", 4096, 0, 0, None, ("a, b", 'c"'), "two\nlines, é", 0.5, math.nan, 3, 9, 8)
    ]
    comparison.text = [TextBlock(FULL.name, 4096, 0, 2048, (-1.0, -2.5))]
    comparison.memory = [Memory(TOPK.name, 4096, 1024.0, 7)]
    csv.write(comparison, tmp_path / "rows")
    names = ["answers.csv", "memory.csv", "speed.csv", "text.csv"]
    assert sorted(file.name for file in (tmp_path / "rows").iterdir()) == names
    answers, memory, speed, text = (_rows(tmp_path / "rows" / name) for name in names)
    assert answers[0] | {"predicted_answer": "two\nlines, é", "task": "vt"} == answers[0]
    assert json.loads(answers[0]["answer"]) == ["a, b", 'c"']
    assert (answers[0]["logprob"], answers[0]["depth"]) == ("", "")
    assert (text[0]["logprob"], text[0]["tokens"], text[0]["kl"]) == ("-3.5", "2", "")
    assert len(speed) == len(comparison.speed)
    assert float(speed[0]["tpot"]) == comparison.speed[0].figures["tpot"]
    assert (speed[-1]["attempt"], speed[-1]["tpot"], speed[-1]["stolen"]) == ("2", "", "")
    assert memory == [
        {"deployment": TOPK.name, "length": "4096", "bytes": "1024.0", "fits": "7", "error": ""}
    ]


def _rows(file: Path):
    with file.open(encoding="utf-8", newline="") as lines:
        return list(reader.DictReader(lines))
