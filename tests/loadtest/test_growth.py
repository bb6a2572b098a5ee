"""Growth: its order of measuring, by engines that are not there, and its tables, report and document."""

import io
import json
import math
import os
import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import msgspec
import pytest
from rich.console import Console

from loadtest.direct.growth import document, engines, measure
from loadtest.direct.growth.report import render
from loadtest.direct.growth.table import series, table
from loadtest.direct.growth.types import Growth, Plan, Point, Survey, Variant
from loadtest.direct.work import NO_TIME, Findings
from loadtest.measuring.rounds import Rounds
from loadtest.measuring.types import Measurement

PLAN = Plan((64, 256), (1, 2), 2, 6, (), 60.0, ())
POINTS = (Point(64, 1), Point(256, 1), Point(64, 2))
MODEL = {"name": "m", "dtype": "float32", "weights": "int4", "kv_dtype": "float16", "device": "cpu"}


def variant(name, refusal=None):
    return Variant(name, {}, "cpu_paged", refusal, ("--attention", name))


def measured(name, point, visit, figures):
    return Measurement(name, point.label, visit // 2, visit % 2, 0, 0.0, 1.0, figures)


def test_one_point_is_not_measured_twice():
    assert PLAN.points == POINTS
    assert replace(PLAN, contexts=(64,), streams=(3,)).points == (Point(64, 3),)


def test_a_single_context_heads_its_series():
    survey = Survey(MODEL, {}, "f", (), (), (64,))
    growth = Growth("now", {}, replace(PLAN, contexts=(64,)), survey)
    assert [[amount for amount, _ in each.points] for each in series(growth)] == [[64], [1, 2]]


class Worker:
    """A process whose engine takes a millisecond per stream and fails as its variant's name says."""

    made: ClassVar[list[str]] = []

    def __init__(self, load, arguments):
        self.name, self.pid = arguments[0].name, os.getpid()
        self.made.append(self.name)

    def end(self, at_once=False):
        self.made.append(f"end of {self.name}")

    def part(self, name, findings, end, *more):
        if name == "ready":
            return "failed: its process was killed by signal 9" if self.name == "broken" else None
        point = more[0]
        if self.name == "slow" and point == POINTS[2]:
            return NO_TIME
        if self.name == "full" and point == POINTS[1]:
            findings.facts["no room"] = "no room here"
            return None
        findings.figures |= {"tpot": 0.001 * point.streams * (2 if self.name == "full" else 1)}
        return None


def test_variants_are_paired_with_full_attention_and_one_that_fails_leaves_the_others_theirs(monkeypatch):
    def run(load, parts, arguments, end):
        names = ("full", "broken", "slow", "good")
        variants = (*(variant(name) for name in names), variant("absent", "not here"))
        found = Survey(MODEL, {}, "folder", variants, (), PLAN.contexts)
        return Findings(facts={"survey": msgspec.json.encode(found).decode()})

    monkeypatch.setattr(measure.work, "run", run)
    monkeypatch.setattr(engines.work, "Worker", Worker)
    monkeypatch.setattr(Worker, "made", [])
    # This machine's own work has no part in it.
    monkeypatch.setattr("loadtest.measuring.weather.disturbance", lambda observed: "")
    kept = []
    growth = measure.measure(PLAN, lambda words: None, lambda growth: kept.append(len(growth.measurements)))
    assert kept == sorted(kept)
    assert len(kept) == 6
    # At most two at a time; an engine that was brought down is opened again, one that can't be opened is not.
    open_ones, most = set(), 0
    for word in Worker.made:
        (open_ones.discard if word.startswith("end of ") else open_ones.add)(word.removeprefix("end of "))
        most = max(most, len(open_ones))
    assert most == 2
    assert Worker.made.count("broken") == 1
    assert Worker.made.count("full") == 1
    assert not open_ones
    good = growth.survey.variants[3]
    assert growth.ratio("good", POINTS[0]).value == pytest.approx(2.0)
    assert growth.ratio("good", POINTS[0]).count == 6
    assert growth.ratio("good", POINTS[0]).claimed
    # Where full has no room the others are measured by themselves.
    assert math.isnan(growth.ratio("good", POINTS[1]).value)
    assert growth.seconds("good", POINTS[1]).value * 1e3 == pytest.approx(1.0)
    assert growth.seconds("good", POINTS[1]).count == 6
    assert growth.reasons(good) == []
    assert growth.reasons(growth.survey.variants[0]) == ["256 tokens x 1: no room here"]
    assert growth.reasons(growth.survey.variants[1]) == [
        "64 tokens x 1, 256 tokens x 1, 64 tokens x 2: its process was killed by signal 9"
    ]
    assert growth.reasons(growth.survey.variants[2]) == [
        "64 tokens x 2: not measured within 60 seconds; give a longer --budget, or less to do"
    ]
    assert growth.reasons(growth.survey.variants[4]) == ["not here"]
    assert not growth.complete


def fake(monkeypatch, worker, *names):
    """Engines that are not there, one per name."""
    found = Survey(MODEL, {}, "folder", tuple(variant(name) for name in names), (), PLAN.contexts)
    told = Findings(facts={"survey": msgspec.json.encode(found).decode()})
    monkeypatch.setattr(measure.work, "run", lambda *given: told)
    monkeypatch.setattr(engines.work, "Worker", worker)
    monkeypatch.setattr(worker, "made", [])
    monkeypatch.setattr("loadtest.measuring.weather.disturbance", lambda observed: "")


def test_a_point_whose_interval_is_narrow_needs_no_more_rounds(monkeypatch):
    class Noisy(Worker):
        def part(self, name, findings, end, *more):
            if name == "decode":
                noise = 0.4 * (more[2] // 6 % 2) if more[0] == POINTS[2] else 0.0  # in every other round
                findings.figures["tpot"] = 0.002 if self.name == "full" else 0.001 * (1 + noise)

    fake(monkeypatch, Noisy, "full", "good")
    growth = measure.measure(replace(PLAN, rounds=9), lambda words: None, lambda growth: None)
    assert [growth.ratio("good", point).count for point in POINTS] == [6, 6, 9]
    assert growth.complete
    assert [growth.short(each) for each in growth.survey.variants] == ["", ""]


def test_points_that_the_budget_does_not_reach_are_told(monkeypatch):
    now = 0.0

    def clock():
        return now

    class Slow(Worker):
        def part(self, name, findings, end, *more):
            nonlocal now
            now += 0.05 if name == "decode" else 0
            return super().part(name, findings, end, *more)

    fake(monkeypatch, Slow, "full", "good", "better")
    monkeypatch.setattr(measure, "time", SimpleNamespace(monotonic=clock))
    monkeypatch.setattr(measure, "Rounds", partial(Rounds, clock=clock))
    growth = measure.measure(replace(PLAN, budget=3.0), lambda words: None, lambda growth: None)
    assert 2.0 < now < 3.2
    good, better = growth.survey.variants[1:]
    for each in (good, better):
        assert growth.reasons(each) == []
        assert re.fullmatch(
            r"64 tokens x 1 \([1-5]\), 256 tokens x 1 \([1-5]\), 64 tokens x 2 \([1-5]\): fewer than 6 "
            "undisturbed rounds; give a longer --budget",
            growth.short(each),
        )
    none = measure.measure(replace(PLAN, budget=0.0), lambda words: None, lambda growth: None)
    assert none.reasons(good) == [
        "64 tokens x 1, 256 tokens x 1, 64 tokens x 2: the budget ended before it was measured; give a "
        "longer --budget, or less to do"
    ]
    assert not none.complete
    console = Console(width=150, file=io.StringIO())
    console.print(table(growth))
    assert "good: 64 tokens x 1" in console.file.getvalue()


def test_a_model_that_cannot_be_served_at_all_is_said_in_a_sentence(monkeypatch):
    troubles = {"survey": "failed: there is no model 'x'"}
    monkeypatch.setattr(measure.work, "run", lambda *given: Findings(troubles=troubles))
    with pytest.raises(measure.NothingToMeasureError, match=r"^there is no model 'x'$"):
        measure.measure(PLAN, lambda words: None, lambda growth: None)


def test_tables_and_report_tell_missing_points_and_why(tmp_path):
    variants = (variant("full"), variant("window"), variant("flash", "flash needs <CUDA>"))
    growth = Growth(
        "now", {"cores": 2, "cpu": "c"}, PLAN, Survey(MODEL, {}, "f", variants, ("a note",), (64, 256))
    )
    for number in range(12):
        for place, point in enumerate(POINTS):
            figures = {"tpot": 0.01 * (place + 1), "pages_read": 1}
            growth.measurements.append(measured("full", point, number, figures))
        growth.measurements.append(measured("window", POINTS[1], number, {"tpot": 0.005}))
    growth.failed["window"] = {point.label: "it was tired" for point in (POINTS[0], POINTS[2])}
    growth.busy = "too busy"
    console = Console(width=150, file=io.StringIO())
    console.print(table(growth))
    text = console.file.getvalue()
    assert re.search(r"window +- +5\.00", text)
    assert "x 4.00 (4.00-4.00)" in text
    assert "! flash: flash needs <CUDA>" in text
    assert "! window: 64 tokens x 1, 64 tokens x 2: it was tired" in text
    assert "! too busy" in text
    html = render(growth)
    assert html.count("<figure") == 2
    assert "flash needs &lt;CUDA&gt;" in html
    assert "a note" in html
    document.save(growth, tmp_path / "growth.json")
    kept = json.loads((tmp_path / "growth.json").read_text())
    assert kept["schema"] == document.SCHEMA
    assert kept["measurements"][0]["figures"]["tpot"] == pytest.approx(0.01)
    figures = {(each["variant"], each["context"], each["streams"]): each for each in kept["figures"]}
    assert figures["window", 256, 1]["times_faster"]["value"] == pytest.approx(4.0)
    assert figures["window", 64, 1]["seconds"]["value"] is None
    assert kept["plan"]["contexts"] == [64, 256]
